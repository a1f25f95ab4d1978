"""The plan's own tensors in a streamed write: they are put into a file aside, and copied from it like the base's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from shoal.errors import WriteError
from shoal.models.names import Name, renamed, state_shapes
from shoal.models.shards import Stored, read_places
from shoal.writing.blueprint import Blueprint

_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def own_name(weights_id: str | None, rest: str) -> str:
    """Under which name the tensor `rest` of the layer lies aside where a run has its own; no file holds such a one."""
    return f"\0{weights_id}.{rest}"


def own_places(
    model: PreTrainedModel,
    names: Mapping[str, Name],
    stored: Mapping[str, Stored],
    plans: Blueprint,
    aside: Path | None,
) -> dict[str, Stored]:
    """Where each of the plan's own tensors lies, in the dtype of the tensor of the files in whose place it is.

    Raises W281 for one that is made of the base's weights (low-rank factors are multiplied with them), and for one that
    has no single tensor of the files in its place: experts that transformers puts together when it loads.
    """
    if not plans.weights:
        return {}
    assert aside is not None
    found = renamed(model, {name: place.shape for name, place in stored.items()}, state_shapes(model))
    whole = {(name.layer, name.rest): file for file, name in names.items() if not found[file].converter}
    tensors: dict[str, torch.Tensor] = {}
    for one in plans.origins():
        for file, name in names.items():
            key = f"{one.weights}.{name.rest}"
            if name.layer == one.layer and key in plans.weights and whole.get((one.layer, name.rest)) == file:
                tensors[key] = plans.weights[key].to(_TORCH.get(stored[file].dtype, plans.weights[key].dtype))
    lost = next((key for key in plans.weights if key not in tensors or tensors[key].is_meta), None)
    if lost is not None:
        why = "is made of weights that are not read" if lost in tensors else "stands for tensors that lie apart there"
        raise WriteError(
            f"a streamed write copies tensors from files, and the plan's {lost} {why}; write it without --stream",
            code="W281",
        )
    beside = aside / "own.safetensors"
    save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, beside)
    return {f"\0{key}": place for key, place in read_places(beside).items()}
