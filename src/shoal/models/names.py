"""Names of tensors in files -> names in the model: prefixes, tied heads and formats that transformers converts."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from shoal.errors import ModelError, WriteError
from shoal.models.beside_layers import announced_by, beside_layers, number_of
from shoal.models.renaming import Renamed, renamed, state_shapes
from shoal.models.stacks import Stack
from shoal.plan.tensors import Shapes

__all__ = ["Name", "Renamed", "attributed", "renamed", "state_shapes"]


@dataclass(frozen=True, slots=True)
class Name:
    """One tensor of a file."""

    model: str
    """The (first) tensor of the model that is made from it."""
    layer: int | None = None
    """The layer that it belongs to; None outside the stack."""
    rest: str = ""
    """`model` behind the number of the layer."""
    prefix: str = ""
    """The file's name before the number."""
    tail: str = ""
    """The file's name behind the number."""

    def at(self, slot: int) -> str:
        """The file's name of the same tensor of the layer in place `slot`."""
        return f"{self.prefix}{slot}{self.tail}"


def attributed(model: PreTrainedModel, stack: Stack, shapes: Shapes) -> dict[str, Name]:
    """{name in the files: what it is} for the tensors `shapes` of a checkpoint of `model` (which may be on `meta`).

    Names go through the renamings that transformers itself applies when it loads. What has no place outside the layers
    is left out, as loading leaves it out, and so are layers beside the model's (`beside_layers`). Each layer, and what
    is outside, must have as many elements in the files as in the model, so nothing is forgotten.
    Raises `WriteError` W217 for a tensor that cannot be attributed, W218 for one of another size, `ModelError` M310
    for one that is missing.
    """
    state = state_shapes(model)
    found = renamed(model, shapes, state)
    known = {file: (one.name, one.converted) for file, one in found.items() if one.name is not None}
    lost: dict[str, int] = {}
    inside = {file: number for file, (name, _) in known.items() if (number := _layer(name, stack)) is not None}
    prefix = _prefix(inside, stack)
    _refuse_strange(model, stack, prefix, found)
    names = {}
    for file, (name, converted) in known.items():
        if not converted and shapes[file] != state[name]:
            raise WriteError(
                f"the tensor {file} is {list(shapes[file])} in the files and {list(state[name])} in the model; "
                "mend the checkpoint",
                code="W218",
            )
        if file in inside:
            rest = name[len(f"{stack.path}.{inside[file]}.") :]
            names[file] = Name(name, inside[file], rest, prefix, file[len(f"{prefix}{inside[file]}") :])
        else:
            names[file] = Name(name)
        lost[name] = lost.get(name, 0) + math.prod(shapes[file])
    _require_whole(model, stack, state, lost)
    return names


def _refuse_strange(model: PreTrainedModel, stack: Stack, prefix: str, found: Mapping[str, Renamed]) -> None:
    """Raise W217 for a tensor without a place in a layer of the model."""
    strange = {f: number_of(f, prefix) for f, one in found.items() if one.name is None and not one.ignored}
    if any(number is not None for number in strange.values()):
        count = sum(announced_by(model.config).values())
        beside = beside_layers(model, prefix, found, stack.depth, count)
        file = next((f for f, number in strange.items() if number is not None and number not in beside), None)
        if file is not None:
            raise WriteError(
                f"the tensor {file} belongs to no part of {type(model).__name__} ({stack.path} holds its layers); "
                "load the model and write it without streaming",
                code="W217",
            )


def _layer(name: str, stack: Stack) -> int | None:
    start = f"{stack.path}."
    number = name[len(start) :].partition(".")[0] if name.startswith(start) else ""
    return int(number) if number.isdecimal() else None


def _prefix(inside: Mapping[str, int], stack: Stack) -> str:
    """What stands before the layer's number in the files: the one place where every name has it."""
    common: set[str] | None = None
    for file, number in inside.items():
        pieces = file.split(".")
        here = {".".join([*pieces[:i], ""]) for i, piece in enumerate(pieces) if piece == str(number)}
        common = here if common is None else common & here
        if not common:
            raise WriteError(
                f"the tensor {file} belongs to layer {number} of {stack.path}, but its name does not say so like the "
                "others; load the model and write it without streaming",
                code="W217",
            )
    if common is None or len(common) != 1:
        raise WriteError(
            f"the names of the files' tensors do not say which layer of {stack.path} they belong to, as in "
            f"{next(iter(inside), 'none')}; load the model and write it without streaming",
            code="W217",
        )
    return common.pop()


def _require_whole(model: PreTrainedModel, stack: Stack, state: Shapes, found: Mapping[str, int]) -> None:
    tied = getattr(model, "all_tied_weights_keys", {})
    optional = list(model._keys_to_ignore_on_load_missing or ())
    needed: dict[int | None, int] = defaultdict(int)
    held: dict[int | None, int] = defaultdict(int)
    missing: dict[int | None, str] = {}
    for name, shape in state.items():
        layer = _layer(name, stack)
        held[layer] += found.get(name, 0)
        if name not in found and name in tied:
            if layer is not None:
                raise WriteError(
                    f"the tensor {name} of layer {layer} is the same as {tied[name]}, so the layer cannot be copied "
                    "alone; load the model and write it without streaming",
                    code="W217",
                )
            continue
        if name not in found and any(re.search(pattern, name) for pattern in optional):
            continue
        needed[layer] += math.prod(shape)
        if name not in found:
            missing.setdefault(layer, name)
    for layer, elements in needed.items():
        if held[layer] < elements and layer in missing:
            raise ModelError(f"the files lack the tensor {missing[layer]} of the model; copy them again", code="M310")
        if held[layer] != elements:
            where = "outside the layers" if layer is None else f"of layer {layer}"
            raise WriteError(
                f"the tensors {where} have {held[layer]:,} elements in the files and {elements:,} in the model; "
                "load the model and write it without streaming",
                code="W218",
            )
