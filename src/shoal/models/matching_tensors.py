"""Whether the tensors of a folder match the model of its config, checked before a weight is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from shoal.errors import ModelError
from shoal.models.beside_layers import announced_by, beside_layers
from shoal.models.conversions import misfit
from shoal.models.quantised import quantisation_settings
from shoal.models.renaming import Renamed, renamed, state_shapes
from shoal.models.stacks import Stack, find_stacks

ShapesOrNames = Mapping[str, tuple[int, ...] | None]
"""Of each tensor its shape, or None where only its name is known."""


def require_matching_tensors(folder: str | Path, model: PreTrainedModel, shapes: ShapesOrNames) -> tuple[str, ...]:
    """The tensors of `shapes` that no part of the model takes and that its class does not name as left aside.

    Raises `ModelError`: M313 the tensors hold another number of layers than the config says, M310 a tensor is missing,
    M336 one has another shape. `model`: of the folder's config, on any device; `shapes`: None for a tensor of which
    only the name is known.

    What transformers splits when it loads is left to it, and so are tensors that it ignores.
    """
    state = state_shapes(model)
    found = renamed(model, shapes, state)
    for stack in _stacks(model):
        _require_depth(folder, model, stack, found)
    if quantisation_settings(model.config) is not None:
        return ()  # packed tensors have shapes of their own
    for file, one in found.items():
        shape = shapes[file]
        if one.name is not None and not one.converted and shape is not None and shape != state[one.name]:
            raise ModelError(
                f"{folder}: the tensor {file} is {list(shape)} in the files, and {list(state[one.name])} "
                "by config.json; repair one of them",
                code="M336",
            )
    extra = tuple(file for file, one in found.items() if one.name is None and not one.ignored)
    missing = _incomplete(shapes, state, found)
    if missing is None:
        _require_fit(folder, model, shapes, found, state)
        return extra
    missing += unprovided(model, state, {one.name for one in found.values() if one.name is not None})
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} tensors of its model, such as {missing[0]}; copy the files again",
            code="M310",
        )
    _require_fit(folder, model, shapes, found, state)
    return extra


def _require_fit(
    folder: str | Path,
    model: PreTrainedModel,
    shapes: ShapesOrNames,
    found: Mapping[str, Renamed],
    state: Mapping[str, tuple[int, ...]],
) -> None:
    """M336 for tensors that transformers cannot put together, or split, into those of the model."""
    known = {file: shape for file, shape in shapes.items() if shape is not None}
    wrong = misfit(model, known, found, state) if len(known) == len(shapes) else None
    if wrong is not None:
        raise ModelError(
            f"{folder}: transformers cannot make {wrong.name} of the tensors in the files, see {wrong.file}, which is "
            f"{list(known[wrong.file])} ({wrong.why}); repair it",
            code="M336",
        )


def _incomplete(
    shapes: ShapesOrNames, state: Mapping[str, tuple[int, ...]], found: Mapping[str, Renamed]
) -> list[str] | None:
    """The tensors that are put together from several and are not all there, by their elements. None where a tensor is
    split into several, or only names are known: what is missing cannot be told then."""
    parts: dict[str, int] = {}
    for file, one in found.items():
        if one.name is None or not one.converted:
            continue
        shape = shapes[file]
        if shape is None:
            return None
        parts[one.name] = parts.get(one.name, 0) + math.prod(shape)
    if any(held > math.prod(state[name]) for name, held in parts.items()):
        return None
    return [name for name, held in parts.items() if held < math.prod(state[name])]


def _stacks(model: PreTrainedModel) -> list[Stack]:
    """None for a model that has no plans (M302, M303), which may well be loaded."""
    try:
        return list(find_stacks(model))
    except ModelError:
        return []


def unprovided(model: PreTrainedModel, state: Mapping[str, object], held: set[str]) -> list[str]:
    """The tensors of the model that neither files (`held`) nor a tie nor the class itself provide."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {}) or {}
    provided = held | {target for target, origin in tied.items() if origin in held}
    provided |= {origin for target, origin in tied.items() if target in held}
    provided |= {target for target, origin in tied.items() if origin in provided}
    optional = list(model._keys_to_ignore_on_load_missing or ())
    return [n for n in state if n not in provided and not any(re.search(pattern, n) for pattern in optional)]


def _require_depth(folder: str | Path, model: PreTrainedModel, stack: Stack, tensors: Mapping[str, Renamed]) -> None:
    pattern = re.compile(rf"(?:^|\.){re.escape(stack.path)}\.(\d+)\.")
    matches = [m for name in tensors if (m := pattern.search(name))]
    found = {int(m.group(1)) for m in matches}
    if found and found > set(range(stack.depth)):
        prefix = matches[0].string[: matches[0].start(1)]
        count = sum(announced_by(model.config).values())
        found -= set(beside_layers(model, prefix, tensors, stack.depth, count))
    if found and found != set(range(stack.depth)):
        raise ModelError(
            f"{folder}: config.json says {stack.depth} layers, the tensors hold layers {min(found)} to {max(found)}, "
            f"{len(found)} of them; `shoal doctor` says more, and can repair it",
            code="M313",
        )
