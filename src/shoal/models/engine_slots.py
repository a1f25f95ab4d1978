"""What an engine with a cache row for each layer needs to run a plan: one slot for every run, in plain data.

A planned checkpoint says it in its config.json beside the plan, so that an engine's plugin reads JSON alone: the stock
architecture, the stock config with one layer for every slot, and of each slot whose tensors it has and whose keys,
values or attention map it takes. Tensors are those of the folder. `packages/shoal-vllm` reads it; what changes here
changes `FORMAT`, so that an older or newer plugin refuses the folder in place of misreading it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from shoal.errors import WriteError
from shoal.models.depth import permuted_config
from shoal.models.examine import LayerFacts
from shoal.models.opened import OpenedModel
from shoal.plan import Exit, Map, Parallel, Plan, Run, Step, shapes_of
from shoal.plan.around import around_run
from shoal.plan.later import later_sources
from shoal.plan.steps import gate_of, key_source, map_source, runs, value_source
from shoal.plan.tensors import Shapes, of_another_shape, tensors_of, tensors_of_run

FORMAT = "shoal-slots/1"
_OF_THE_FILE = ("_name_or_path", "architectures", "transformers_version")
"""Fields that say where a config was read."""


def engine_slots(opened: OpenedModel, plan: Plan, weights: Mapping[str, Any]) -> dict[str, Any] | None:
    """The slots of a plan, see `slots_or_why`; None where it has none."""
    return slots_or_why(opened, plan, weights)[0]


def slots_or_why(
    opened: OpenedModel, plan: Plan, weights: Mapping[str, Any], held: Iterable[str] = ()
) -> tuple[dict[str, Any] | None, str | None]:
    """The slots of a plan: `architectures` and `config` of a stock model with a layer for each run, `layers`, the path
    of the list of layers in the names of tensors, `slots` and, by base layer, `parts`. Or None and what stands
    against it: no stock config can have them, something else than runs and maps happens, a run takes something from a
    later one, the model has several stacks, or tensors that a run has of its own (`weights`) are of another shape than
    its layer's, or stand around it.

    A slot has `base`, the layer whose place and tensors it has; `part`; `tie`, a layer whose matrices stand in place of
    its own; `own`, the ids of new tensors (shoal.ID.NAME) over these, later ones last; `keys`, `values` and `map`, the
    slots from which it takes these; `before`, ids of maps that stand in front of it. `new` has the shapes of these
    tensors by id and name, `outside` those of `held`, the base's tensors in the folder, that are no layer's: an engine
    can say what is lost. `parts` name the modules of a layer's attention and mlp, how many values each returns beside
    its tensor (-1: none, and no tuple), and with its width each module that makes keys or values and nothing else.
    """
    stack = opened.stack(plan.stack_name())
    steps = plan.steps(stack.name)
    if len(opened.stacks) > 1 or stack.config is not opened.model.config:
        return None, "its model is more than one decoder"
    if any(later_sources(steps)):
        return None, "a run takes something from a layer that runs later"
    shapes = shapes_of(weights)
    unfit = _other_steps(steps) or _fits_no_layer(opened, stack.name, steps, shapes)
    if unfit:
        return None, unfit
    slots, behind = _slots(steps)
    if not slots:
        return None, "no layer runs"
    try:
        config, _ = permuted_config(stack.config, tuple(slot["base"] for slot in slots))
    except WriteError as error:
        return None, str(error)
    model: PreTrainedModel = opened.model
    fields = {name: value for name, value in config.to_dict().items() if name not in _OF_THE_FILE}
    fields["dtype"] = str(model.dtype).removeprefix("torch.")
    facts = opened.facts(stack.name).layers
    ids = [*behind, *(one for slot in slots for one in (*slot.get("own", ()), *slot.get("before", ())))]
    return {
        "format": FORMAT,
        "architectures": [type(model).__name__],
        "config": json.loads(json.dumps(fields)),
        "layers": stack.path,
        "outside": [name for name in held if not name.startswith(f"{stack.path}.")],
        "slots": slots,
        "behind": behind,
        "parts": {str(base): _parts(facts[base]) for base in sorted({slot["base"] for slot in slots})},
        "new": {one: {name: list(shape) for name, shape in tensors_of(one, shapes).items()} for one in sorted({*ids})},
    }, None


def _other_steps(steps: tuple[Step, ...]) -> str | None:
    """What happens besides runs and maps."""
    if any(isinstance(step, Exit) for step in steps):
        return "the pass may end early or has a head of its own"
    if any(isinstance(step, Parallel) for step in steps):
        return "layers run in parallel"
    return "runs are gated" if any(gate_of(step) for step in steps) else None


def _fits_no_layer(opened: OpenedModel, stack: str, steps: tuple[Step, ...], weights: Shapes) -> str | None:
    layers = opened.spec.stack(stack).layers
    own = [(layers[run.layer], tensors_of_run(run, weights)) for run in runs(steps)]
    if any(of_another_shape(layer, tensors) for layer, tensors in own):
        return "a run has tensors of another shape than its layer's"
    return "tensors stand around a run" if any(around_run(tensors) for _, tensors in own) else None


def _slots(steps: tuple[Step, ...]) -> tuple[list[dict[str, Any]], list[str]]:
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
    return found, maps


def _slot(run: Run, latest: dict[tuple[str, int], int], maps: list[str]) -> dict[str, Any]:
    sources = {"keys": key_source(run), "values": value_source(run), "map": map_source(run)}
    taken = {half: latest[half, layer] for half, layer in sources.items() if layer is not None}
    own = {"tie": run.tied_layer, "own": list(run.ids), "before": maps}
    said = {name: value for name, value in own.items() if value not in (None, [])}
    return {"base": run.layer, "part": run.part} | said | taken


def _parts(fact: LayerFacts) -> dict[str, Any]:
    if fact.parts is None:
        return {}
    found = {"attention": list(fact.parts.attention), "mlp": list(fact.parts.mlp), "returns": dict(fact.returns)}
    unused = () if fact.roles is None else fact.roles.unused({"keys", "values"})
    return found | {"stored": {name: fact.roles.widths[name] for name in unused}} if fact.roles and unused else found
