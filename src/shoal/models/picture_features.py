"""Where a model adds what its vision tower found to the states between decoder layers (DeepStack), for another depth.

DeepStack: Meng et al. 2024, arXiv 2406.04334. The loop over the layers adds the features, so they keep their places
while a plan runs live. A stock model of another depth adds them at numbers of its own layers, by its class or its
config.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from transformers import PreTrainedConfig

from shoal.errors import PlanError

BEHIND_FIRST = ("deepstack_visual_indexes",)
"""Lists of vision layers: what entry i finds is added behind decoder layer i, whatever the config says."""
BEFORE = ("deepstack_layer_map", "spatial_target_layers")
"""Lists of decoder layers, or of pairs of a vision layer and a decoder layer, before which features are added."""


def renumbered_features(
    config: PreTrainedConfig, made: PreTrainedConfig, depth: int, slots: tuple[int, ...]
) -> dict[str, tuple[Any, Any]]:
    """Give `made` the places at which a model of `config`, whose decoder has `depth` layers, adds features when slot s
    is base layer `slots[s]`, and return {field: (old, new)} of what changed. Both are configs of the whole model.

    Raises `PlanError` P151 for layers whose places a stock model cannot change, P152 for features that would be added
    behind the last layer, or two of them before one layer.
    """
    for one in _parts(config):
        for name in BEHIND_FIRST:
            found = getattr(one, name, None)
            if isinstance(found, list | tuple):
                _require_first(config.model_type, min(depth, len(found)), slots)
    changed: dict[str, tuple[Any, Any]] = {}
    taken: dict[int, int] = {}
    for name in BEFORE:
        old = getattr(config, name, None)
        if isinstance(old, list | tuple):
            new = [_moved(entry, depth, slots, taken) for entry in old]
            if list(old) != new:
                setattr(made, name, new)
                changed[name] = (old, new)
    return changed


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The config and those inside it, the deepest ones too."""
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield from _parts(inner)


def _ran(slots: tuple[int, ...], layer: int) -> int:
    """How many slots have run when the loop comes to base layer `layer`: a slot runs as soon as it and all before it
    have been offered."""
    return sum(highest < layer for highest in accumulate(slots, max))


def _require_first(family: str, count: int, slots: tuple[int, ...]) -> None:
    moved = next((i for i in range(count) if _ran(slots, i + 1) != i + 1), None)
    if moved is not None:
        first = "layer 0" if count == 1 else f"layers 0 to {count - 1}"
        raise PlanError(
            f"decoder layer {moved} is moved, repeated or gone, but a stock {family} model adds what it sees in a "
            f"picture behind its first {count}; begin the plan with {first}, each once, or run it live",
            code="P151",
        )


def _moved(entry: Any, depth: int, slots: tuple[int, ...], taken: dict[int, int]) -> Any:
    layer = entry[-1] if isinstance(entry, list | tuple) and entry else entry
    if type(layer) is not int or layer < 0:  # which names no layer
        return entry
    place = _ran(slots, layer)
    if layer >= depth:  # which adds nothing, and shall go on so
        place = layer - depth + len(slots)
    elif place >= len(slots) or taken.setdefault(place, layer) != layer:
        lost = "and no layer of the plan comes after that"
        why = lost if place >= len(slots) else f"where what it adds before layer {taken[place]} would be too"
        raise PlanError(
            f"the model adds what it sees in a picture before decoder layer {layer}, {why}; keep more of the layers "
            "that deepstack_layer_map and spatial_target_layers of config.json name, or run it live",
            code="P152",
        )
    return [*entry[:-1], place] if isinstance(entry, list | tuple) else place
