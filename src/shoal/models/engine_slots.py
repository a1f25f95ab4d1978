"""What an engine with a cache row for each layer needs to run a plan: one slot for every run, in plain data.

A planned checkpoint says it in its config.json beside the plan, so that an engine's plugin reads JSON alone: the stock
architecture, the stock config with one layer for every slot, and of each slot whose tensors it has and whose keys,
values or attention map it takes. Tensors are those of the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from shoal.errors import WriteError
from shoal.models.depth import permuted_config
from shoal.models.examine import LayerFacts
from shoal.models.opened import OpenedModel
from shoal.plan import Exit, Map, Parallel, Plan, Run, Step, shapes_of
from shoal.plan.around import around_run
from shoal.plan.later import later_sources
from shoal.plan.steps import key_source, map_source, runs, value_source
from shoal.plan.tensors import Shapes, of_another_shape, tensors_of_run

_OF_THE_FILE = ("_name_or_path", "architectures", "transformers_version")
"""Fields that say where a config was read."""


def engine_slots(opened: OpenedModel, plan: Plan, weights: Mapping[str, Any]) -> dict[str, Any] | None:
    """The slots of a plan: `architectures` and `config` of a stock model with a layer for each run, `slots` and, by
    base layer, `parts`. None where no stock config can have them, where something else than runs and maps
    happens, where a run takes something from a later one, for models of several stacks, and where tensors that a run
    has of its own (`weights`) are of another shape than its layer's, or stand around it.

    A slot has `base`, the layer whose place and tensors it has; `part`; `tie`, a layer whose matrices stand in place of
    its own; `own`, the ids of new tensors (shoal.ID.NAME) over these, later ones last; `keys`, `values` and `map`, the
    slots from which it takes these; `before`, ids of maps that stand in front of it.
    """
    stack = opened.stack(plan.stack_name())
    steps = plan.steps(stack.name)
    made = None if any(later_sources(steps)) or len(opened.stacks) > 1 else _slots(steps)
    if made is None or stack.config is not opened.model.config:
        return None
    if _fits_no_layer(opened, stack.name, steps, shapes_of(weights)):
        return None
    slots, behind = made
    try:
        config, _ = permuted_config(stack.config, tuple(slot["base"] for slot in slots))
    except WriteError:
        return None
    model: PreTrainedModel = opened.model
    fields = {name: value for name, value in config.to_dict().items() if name not in _OF_THE_FILE}
    fields["dtype"] = str(model.dtype).removeprefix("torch.")
    facts = opened.facts(stack.name).layers
    return {
        "architectures": [type(model).__name__],
        "config": json.loads(json.dumps(fields)),
        "slots": slots,
        "behind": behind,
        "parts": {str(base): _parts(facts[base]) for base in sorted({slot["base"] for slot in slots})},
    }


def _fits_no_layer(opened: OpenedModel, stack: str, steps: tuple[Step, ...], weights: Shapes) -> bool:
    layers = opened.spec.stack(stack).layers
    own = [(layers[run.layer], tensors_of_run(run, weights)) for run in runs(steps)]
    return any(of_another_shape(layer, tensors) or around_run(tensors) for layer, tensors in own)


def _slots(steps: tuple[Step, ...]) -> tuple[list[dict[str, Any]], list[str]] | None:
    """The slots, and the ids of maps behind the last one."""
    found: list[dict[str, Any]] = []
    maps: list[str] = []
    latest: dict[tuple[str, int], int] = {}
    for step in steps:
        match step:
            case Run():
                found.append(_slot(step, latest, maps))
                maps = []
                for half in step.stores:
                    latest[half, step.layer] = len(found) - 1
                if step.part != "mlp" and map_source(step) is None:
                    latest["map", step.layer] = len(found) - 1
            case Map():
                maps.append(step.weights)
            case Parallel() | Exit():
                return None
    return (found, maps) if found else None


def _slot(run: Run, latest: dict[tuple[str, int], int], maps: list[str]) -> dict[str, Any]:
    sources = {"keys": key_source(run), "values": value_source(run), "map": map_source(run)}
    taken = {half: latest[half, layer] for half, layer in sources.items() if layer is not None}
    own = {"tie": run.tied_layer, "own": list(run.ids), "before": maps}
    said = {name: value for name, value in own.items() if value not in (None, [])}
    return {"base": run.layer, "part": run.part} | said | taken


def _parts(fact: LayerFacts) -> dict[str, Any]:
    """The modules of a layer's attention and mlp, and how many values each returns besides its tensor (-1: none, and no
    tuple)."""
    if fact.parts is None:
        return {}
    return {"attention": list(fact.parts.attention), "mlp": list(fact.parts.mlp), "returns": dict(fact.returns)}
