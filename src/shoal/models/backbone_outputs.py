"""The numbered outputs that some vision configs name (`out_indices`, `out_features`), for another depth."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

from shoal.errors import WriteError

FIELDS = ("stage_names", "out_features", "out_indices")


def renumbered_outputs(config: PreTrainedConfig, made: PreTrainedConfig, slots: tuple[int, ...]) -> dict[str, Any]:
    """Give `made` the outputs of `config` under the numbers that they have when slot s is base layer `slots[s]`, and
    return {field: (old, new)} of what changed. Output 0 is the input of the layers, output i + 1 that of layer i; the
    last stays the last. Raises W242 for an output of a layer that is gone, or there twice."""
    names: Any = getattr(config, "stage_names", None)
    chosen: Any = getattr(config, "out_indices", None)
    depth = len(names) - 1 if isinstance(names, list) else 0
    if depth < 1 or depth != config.num_hidden_layers or chosen is None:
        return {}
    old = {name: getattr(config, name) for name in FIELDS}
    made.stage_names = [names[0], *(re.sub(r"\d+$", str(n + 1), names[1]) for n in range(len(slots)))]
    indices = [_renumbered(i % len(names), depth, slots) for i in chosen]
    made.set_output_features_output_indices(out_features=None, out_indices=indices)
    return {name: (old[name], getattr(made, name)) for name in FIELDS if old[name] != getattr(made, name)}


def _renumbered(index: int, depth: int, slots: tuple[int, ...]) -> int:
    if index in (0, depth):
        return len(slots) if index else 0
    places = [slot + 1 for slot, layer in enumerate(slots) if layer == index - 1]
    if len(places) != 1:
        raise WriteError(
            f"out_indices names the output of layer {index - 1}, which runs {len(places)} times in the plan; keep the "
            "layer once, or take the index out of config.json",
            code="W242",
        )
    return places[0]
