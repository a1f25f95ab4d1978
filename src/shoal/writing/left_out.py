"""Tensors of a folder that are no part of the model of its config: by name, so that nothing is left out in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shoal.models.beside_layers import announced
from shoal.models.checkpoint import read_json
from shoal.models.load import load_config, structure
from shoal.models.renaming import renamed, state_shapes
from shoal.models.shards import stored_tensors

_SHOWN = 5


def left_out_of(folder: Path | None, model: PreTrainedModel) -> tuple[str, ...]:
    """The tensors of `folder` that transformers leaves out when it loads `model` from there."""
    if folder is None:
        return ()
    found = renamed(model, stored_tensors(folder), state_shapes(model))
    return tuple(file for file, one in found.items() if one.name is None)


def carried_tensors(folder: Path) -> frozenset[str]:
    """What transformers calls the tensors of a written folder beside its model's, where its config announces layers
    beside the others."""
    raw = read_json(folder / "config.json")
    parts: list[dict[str, Any]] = [raw, *(part for part in raw.values() if isinstance(part, dict))]
    if not any(announced(part) for part in parts):
        return frozenset()
    model = structure(load_config(folder), folder)
    found = renamed(model, stored_tensors(folder), state_shapes(model))
    return frozenset(one.called for one in found.values() if one.name is None)


def listed(names: tuple[str, ...]) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
