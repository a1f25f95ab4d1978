"""What a plan does, read from its notation: the facts that the sentences, the picture and the plots share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, assert_never

from shoal.errors import PlanError
from shoal.plan import Exit, Map, Parallel, Run, Step, parse_steps
from shoal.plan.price import layers_run
from shoal.plan.select import exits, groups, maps
from shoal.plan.sources import TiedLayer
from shoal.plan.steps import runs
from shoal.report.formatting import TIMES, esc, ranges


@dataclass(frozen=True, slots=True)
class PlannedStack:
    """One stack of the plan: its base depth and its steps, in the order in which they run."""

    name: str
    depth: int
    steps: tuple[Step, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Every call of a layer, branches of parallel groups included."""
        return tuple(runs(self.steps))

    @property
    def maps(self) -> tuple[Map, ...]:
        return maps(self.steps)

    @property
    def mapped(self) -> frozenset[int]:
        """Layers that a fitted map stands for."""
        return frozenset(layer for step in self.maps for layer in range(step.first, step.last + 1))

    @property
    def dropped(self) -> tuple[int, ...]:
        """Layers of which nothing runs and for which no map stands, ascending."""
        return tuple(sorted(set(range(self.depth)) - {run.layer for run in self.runs} - self.mapped))

    @property
    def layer_runs(self) -> float:
        """Layers executed per token; an attention or mlp alone counts as half."""
        return layers_run(self.runs)

    @property
    def ascending(self) -> bool:
        """True when the base order tells the executed order: upwards, and what runs twice does so at once."""
        order = [layer for step in self.steps for layer in _places(step)]
        return order == sorted(order)

    @property
    def identity(self) -> bool:
        return self.steps == tuple(Run(layer) for layer in range(self.depth))


def stacks(plan: Mapping[str, Any]) -> list[PlannedStack]:
    """The stacks of `data["plan"]`. Raises `NotationError` for a notation that cannot be read and `PlanError` for a
    layer that the stack does not have."""
    found = []
    for name, stack in plan["stacks"].items():
        text = stack.get("notation") or ",".join(stack["steps"])
        facts = PlannedStack(str(name), int(stack["depth"]), parse_steps(text))
        named = [layer for run in facts.runs for layer in run.layers_named]
        named += facts.mapped
        if outside := [layer for layer in named if layer >= facts.depth]:
            raise PlanError(
                f"the report's plan names layer {outside[0]} of stack {name!r}, which has {facts.depth} layers from 0; "
                "give the plan and the depth of the same model",
                code="P103",
            )
        found.append(facts)
    return found


def changed(found: list[PlannedStack]) -> list[PlannedStack]:
    """The stacks that the first screen speaks of: those that the plan changes, else all."""
    return [stack for stack in found if not stack.identity] or found


def sentences(stack: PlannedStack) -> list[str]:
    """What happens to the stack, as short HTML-safe sentences."""
    if stack.identity:
        return [f"All {stack.depth} {esc(stack.name)} layers run once, in order: the base model itself."]
    whole = {run.layer for run in stack.runs if run.part == "layer"}
    all_whole = all(run.part == "layer" for run in stack.runs)
    said = [f"{len(whole)} of {stack.depth} {esc(stack.name)} layers run{'' if all_whole else ' whole'}."]
    facts = {
        "Removed": ranges(stack.dropped),
        "Attention only": ranges(_only(stack, "attention", whole)),
        "Mlp only": ranges(_only(stack, "mlp", whole)),
        "Replaced by a fitted map": ", ".join(ranges(range(step.first, step.last + 1)) for step in stack.maps),
        "In parallel": ", ".join(
            " with ".join(str(run.layer) for run in group.branches) for group in groups(stack.steps)
        ),
        "Repeated": ", ".join(f"{layer} ({n}{TIMES})" for layer, n in repeated(stack).items()),
        **_shared(stack),
        "Own weights": ranges(sorted({run.layer for run in stack.runs if run.weights is not None})),
        "Behind a gate": ranges(sorted({run.layer for run in stack.runs if run.gate is not None})),
        "Exits": ", ".join(esc(step.name) for step in exits(stack.steps) if step.gate is not None),
        "A head of its own": ", ".join(esc(step.head) for step in exits(stack.steps) if step.gate is None),
    }
    said += [f"{what}: {which}." for what, which in facts.items() if which]
    return said if stack.ascending else [*said, "The layers run in another order than in the base model."]


def _shared(stack: PlannedStack) -> dict[str, str]:
    """What runs take from other layers, by what it is."""
    found: dict[str, list[str]] = {}
    for run in stack.runs:
        for source in run.layer_sources:
            found.setdefault(source.summary, []).append(f"{run.layer} reads {source.layer}")
        if run.tie is not None:
            found.setdefault(TiedLayer.summary, []).append(f"{run.layer} has those of {run.tie}")
    return {summary: ", ".join(pairs) for summary, pairs in found.items()}


def repeated(stack: PlannedStack) -> dict[int, int]:
    """Layers that run more than once, with how often; an attention and an mlp apart are one run."""
    counts: dict[int, int] = {}
    for layer in sorted({run.layer for run in stack.runs}):
        parts = [run.part for run in stack.runs if run.layer == layer]
        times = parts.count("layer") + max(parts.count("attention"), parts.count("mlp"))
        if times > 1:
            counts[layer] = times
    return counts


def _only(stack: PlannedStack, part: str, whole: set[int]) -> list[int]:
    parts: dict[int, set[str]] = {}
    for run in stack.runs:
        parts.setdefault(run.layer, set()).add(run.part)
    return sorted(layer for layer, found in parts.items() if layer not in whole and found == {part})


def _places(step: Step) -> list[int]:
    match step:
        case Run():
            return [step.layer]
        case Map():
            return [step.first, step.last]
        case Parallel():
            return [run.layer for run in step.branches]
        case Exit():
            return []
        case _:
            assert_never(step)
