"""Whether the tensors of a folder match the model of its config, checked before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel

from shoal.errors import ModelError
from shoal.models.names import renamed, state_shapes
from shoal.models.stacks import find_stacks

ShapesOrNames = Mapping[str, tuple[int, ...] | None]
"""Of each tensor its shape, or None where only its name is known."""


def require_matching_tensors(folder: str | Path, model: PreTrainedModel, shapes: ShapesOrNames) -> None:
    """Raise `ModelError`: M313 the tensors hold another number of layers than the config says, M310 a tensor is
    missing, M336 one has another shape. `model`: of the folder's config, on any device; `shapes`: None for a tensor of
    which only the name is known.

    What transformers puts together or splits when it loads is left to it, and so are tensors that it ignores.
    """
    for stack in find_stacks(model):
        _require_depth(folder, stack.depth, stack.path, shapes)
    if getattr(model.config, "quantization_config", None) is not None:
        return  # packed tensors have shapes of their own
    state = state_shapes(model)
    found = renamed(model, shapes, state)
    for file, one in found.items():
        shape = shapes[file]
        if one.name is not None and not one.converted and shape is not None and shape != state[one.name]:
            raise ModelError(
                f"{folder}: the tensor {file} is {list(shape)} in the files, and {list(state[one.name])} "
                "by config.json; repair one of them",
                code="M336",
            )
    if any(one.converted for one in found.values()):
        return
    missing = unprovided(model, state, {one.name for one in found.values() if one.name is not None})
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} tensors of its model, such as {missing[0]}; copy the files again",
            code="M310",
        )


def unprovided(model: PreTrainedModel, state: Mapping[str, object], held: set[str]) -> list[str]:
    """The tensors of the model that neither files (`held`) nor a tie nor the class itself provide."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {}) or {}
    provided = held | {target for target, origin in tied.items() if origin in held}
    provided |= {origin for target, origin in tied.items() if target in held}
    provided |= {target for target, origin in tied.items() if origin in provided}
    optional = list(model._keys_to_ignore_on_load_missing or ())
    return [n for n in state if n not in provided and not any(re.search(pattern, n) for pattern in optional)]


def _require_depth(folder: str | Path, depth: int, path: str, shapes: ShapesOrNames) -> None:
    pattern = re.compile(rf"(?:^|\.){re.escape(path)}\.(\d+)\.")
    found = {int(m.group(1)) for name in shapes if (m := pattern.search(name))}
    if found and found != set(range(depth)):
        raise ModelError(
            f"{folder}: config.json says {depth} layers, the tensors hold layers {min(found)} to {max(found)}, "
            f"{len(found)} of them; `shoal doctor` says more, and can repair it",
            code="M313",
        )
