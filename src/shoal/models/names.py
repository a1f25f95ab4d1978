"""Names of tensors in files -> names in the model: prefixes, tied heads and formats that transformers converts."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from shoal.errors import ModelError, WriteError
from shoal.models.stacks import Stack
from shoal.plan.tensors import Shapes


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

    Names go through the renamings that transformers itself applies when it loads; what the model ignores is left out.
    Each layer, and what is outside, must have as many elements in the files as in the model, so nothing is forgotten.
    Raises `WriteError` W217 for a tensor that cannot be attributed, W218 for one of another size, `ModelError` M310
    for one that is missing.
    """
    state = state_shapes(model)
    known = _known(model, stack, shapes, state)
    lost: dict[str, int] = {}
    inside = {file: number for file, (name, _) in known.items() if (number := _layer(name, stack)) is not None}
    prefix = _prefix(inside, stack)
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


@dataclass(frozen=True, slots=True)
class Renamed:
    """Where transformers puts one tensor of a file."""

    name: str | None
    """In the model; None when it belongs to no part of it."""
    converted: bool = False
    """Is it one of several tensors that are put together, or a part of one that is split?"""
    ignored: bool = False
    """Does the model's class say that it may be there all the same?"""


def state_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of a model, which may be on the meta device."""
    found: dict[str, torch.Tensor] = model.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


def renamed(model: PreTrainedModel, files: Iterable[str], state: Shapes) -> dict[str, Renamed]:
    """Each tensor of the files as transformers renames it when it loads `model`, whose tensors are `state`."""
    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    found = {}
    for file in sorted(files, key=dot_natural_key):  # some renamings remember the names before, in this order
        name, pattern = rename_source_key(file, renamings, converters, model.base_model_prefix, state)
        if name not in state and file in state:
            name, pattern = file, None
        if name in state:
            found[file] = Renamed(name, pattern is not None)
        else:
            found[file] = Renamed(None, ignored=any(re.search(pattern, file) for pattern in ignored))
    return found


def _known(model: PreTrainedModel, stack: Stack, shapes: Shapes, state: Shapes) -> dict[str, tuple[str, bool]]:
    """{name in the files: (name in the model, is it converted)}, without ignored ones. Raises W217."""
    found = {}
    for file, one in renamed(model, shapes, state).items():
        if one.name is not None:
            found[file] = (one.name, one.converted)
        elif not one.ignored:
            raise WriteError(
                f"the tensor {file} belongs to no part of {type(model).__name__} ({stack.path} holds its layers); "
                "load the model and write it without streaming",
                code="W217",
            )
    return found


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
