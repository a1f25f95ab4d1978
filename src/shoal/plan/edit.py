"""Plan to plan: every verb returns a new plan and names layers by their base index."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace as with_fields
from typing import assert_never

from shoal.errors import PlanError
from shoal.plan.notation import format_steps, map_weights
from shoal.plan.plan import Plan
from shoal.plan.select import run_of
from shoal.plan.sources import KV, Fill
from shoal.plan.steps import Exit, Join, Map, Parallel, PartName, Run, Step, layers_of, runs, writes_kv


def drop(plan: Plan, layers: Iterable[int], *, part: PartName = "layer", stack: str | None = None) -> Plan:
    """Remove layers, or only their attention or mlp. Raises P103 when a layer, or that part of it, does not run."""
    gone = _existing(plan, layers, stack, part)
    kept = [smaller for step in plan.steps(stack) for smaller in _without(step, gone, part)]
    return plan.with_steps(tuple(kept), stack)


def keep(plan: Plan, layers: Iterable[int], *, stack: str | None = None) -> Plan:
    """Keep only these layers, in the plan's own order."""
    kept = _existing(plan, layers, stack)
    return drop(plan, set(plan.layers(stack)) - kept, stack=stack)


def repeat(plan: Plan, layers: Iterable[int], times: int = 2, *, stack: str | None = None) -> Plan:
    """Run each of these layers `times` times in a row, each time with KV slots of its own.

    Raises P103 when a layer does not run, P120 when it runs in a parallel group or `times` is less than 1.
    """
    if times < 1:
        raise PlanError(f"cannot repeat {times} times; give 1 or more", code="P120")
    again = _existing(plan, layers, stack)
    steps: list[Step] = []
    for step in plan.steps(stack):
        match step:
            case Run():
                steps += [step] * (times if step.layer in again else 1)
            case Parallel() if not again.isdisjoint(layers_of(step)):
                raise PlanError(f"cannot repeat a part of the group {_text(step)}; repeat before grouping", code="P120")
            case Parallel() | Map() | Exit():
                steps.append(step)
            case _:
                assert_never(step)
    return plan.with_steps(tuple(steps), stack)


def reorder(plan: Plan, order: Iterable[int], *, stack: str | None = None) -> Plan:
    """Run the plan's steps in this order of their layers; layers left out are dropped, named twice they repeat.

    Raises P103 when a layer does not run, P120 when the plan holds a map, group or exit, which has no place in `order`.
    """
    wanted = list(order)
    _existing(plan, wanted, stack)
    by_layer: dict[int, list[Run]] = {}
    for step in plan.steps(stack):
        run = run_of(step)
        if run is None:
            raise PlanError(f"cannot reorder a plan with {_text(step)}; reorder first, then add it", code="P120")
        by_layer.setdefault(run.layer, []).append(run)
    return plan.with_steps(tuple(run for i in wanted for run in by_layer[i]), stack)


def replace(plan: Plan, first: int, last: int, *, weights: str | None = None, stack: str | None = None) -> Plan:
    """Put a fitted map where the layers first..last ran; maps inside the span give way to it.

    Raises P103 when `first` or `last` does not run, P114 when the span goes down or cuts through a group or map.
    """
    _existing(plan, (first, last), stack)
    if last < first:
        raise PlanError(f"the span {first}-{last} of a map must go upwards; write {last}-{first}", code="P114")
    stand_in = Map(first, last, weights or map_weights(first, last))
    steps: list[Step] = []
    for step in plan.steps(stack):
        inside = [first <= layer <= last for layer in layers_of(step)]
        if not any(inside):
            steps.append(step)
        elif not all(inside):
            raise PlanError(f"the span {first}-{last} cuts through {_text(step)}; take it in whole", code="P114")
        elif stand_in not in steps:
            steps.append(stand_in)
    return plan.with_steps(tuple(steps), stack)


def parallel(plan: Plan, layers: Iterable[int], *, join: Join = "sum", stack: str | None = None) -> Plan:
    """Let neighbouring layers read one input and add up their changes. Raises P118 when they are not neighbours."""
    members = _existing(plan, layers, stack)
    steps = plan.steps(stack)
    group = tuple(run for run in map(run_of, steps) if run is not None and run.layer in members)
    start = steps.index(group[0]) if group else 0
    after = start + len(group)
    if len(group) < 2 or {run.layer for run in group} != members or steps[start:after] != group:
        raise PlanError(
            f"layers {sorted(members)} do not stand next to each other in {plan}; name two or more neighbours",
            code="P118",
        )
    return plan.with_steps((*steps[:start], Parallel(group, join), *steps[after:]), stack)


def share_kv(plan: Plan, layer: int, source: int, *, stack: str | None = None) -> Plan:
    """Let `layer` attend to the keys and values of the layer `source` and store none of its own.

    Raises P103 when the attention of one of the two does not run.
    """
    _existing(plan, (layer, source), stack, "attention")
    return _edit_runs(plan, {layer}, stack, lambda run: run if run.part == "mlp" else with_fields(run, kv=KV(source)))


def share_map(plan: Plan, layer: int, source: int, *, stack: str | None = None) -> Plan:
    """Let `layer` weigh its own values with the attention map of the earlier layer `source`.

    Raises P103 when the attention of one of the two does not run.
    """
    _existing(plan, (layer, source), stack, "attention")
    return _edit_runs(
        plan, {layer}, stack, lambda run: run if run.part == "mlp" else with_fields(run, kv=KV(attention=source))
    )


def with_weights(plan: Plan, ids: Mapping[int, str], *, stack: str | None = None) -> Plan:
    """Let the attention, or the whole, of each of these layers run with the tensors of the id given for it. Raises P103
    when the attention of one does not run."""
    _existing(plan, ids, stack, "attention")
    return _edit_runs(
        plan, set(ids), stack, lambda run: run if run.part == "mlp" else with_fields(run, weights=ids[run.layer])
    )


def gate(plan: Plan, layers: Iterable[int], *, fill: Fill | None = None, stack: str | None = None) -> Plan:
    """Put a gate called skip.LAYER on each of these layers, for a policy to decide at run time.

    `fill` says what a skipped layer stores; runs that store no KV of their own get none.
    """

    def gated(run: Run) -> Run:
        return with_fields(run, gate=f"skip.{run.layer}", kv=with_fields(run.kv, fill=fill if writes_kv(run) else None))

    return _edit_runs(plan, _existing(plan, layers, stack), stack, gated)


def exit_at(plan: Plan, after: int, *, name: str | None = None, head: str = "base", stack: str | None = None) -> Plan:
    """Put an exit behind the last run of layer `after`, gated as exit.AFTER."""
    _existing(plan, (after,), stack)
    steps = list(plan.steps(stack))
    place = max(n for n, step in enumerate(steps) if any(run.layer == after for run in runs((step,))))
    steps.insert(place + 1, Exit(name or f"exit-{after}", head, f"exit.{after}"))
    return plan.with_steps(tuple(steps), stack)


def _existing(plan: Plan, layers: Iterable[int], stack: str | None, part: PartName = "layer") -> set[int]:
    """The layers as a set. Raises P103 when one of them, or its `part`, does not run in the plan."""
    wanted = set(layers)
    there = {run.layer for run in runs(plan.steps(stack)) if part == "layer" or run.part in ("layer", part)}
    if missing := sorted(wanted - there):
        what = "" if part == "layer" else f"the {part} of "
        raise PlanError(
            f"{what}layer {missing[0]} does not run in the plan {plan} (stack {plan.stack_name(stack)}, "
            f"{plan.depth(stack)} base layers, 0-based); name layers that do",
            code="P103",
        )
    return wanted


def _text(step: Step) -> str:
    return format_steps((step,))


def _without(step: Step, gone: set[int], part: PartName) -> tuple[Step, ...]:
    match step:
        case Run():
            return tuple(_shrink(step, gone, part))
        case Parallel():
            branches = tuple(left for run in step.branches for left in _shrink(run, gone, part))
            return (Parallel(branches, step.join),) if len(branches) > 1 else branches
        case Map() | Exit():
            return (step,)
        case _:
            assert_never(step)


def _shrink(run: Run, gone: set[int], part: PartName) -> list[Run]:
    if run.layer not in gone:
        return [run]
    if part in ("layer", run.part):
        return []
    if run.part != "layer":
        return [run]
    # an mlp has no KV to read or to fill
    return [with_fields(run, part="attention") if part == "mlp" else with_fields(run, part="mlp", kv=KV())]


def _edit_runs(plan: Plan, layers: set[int], stack: str | None, change: Callable[[Run], Run]) -> Plan:
    def edited(run: Run) -> Run:
        return change(run) if run.layer in layers else run

    steps: list[Step] = []
    for step in plan.steps(stack):
        match step:
            case Run():
                steps.append(edited(step))
            case Parallel():
                steps.append(with_fields(step, branches=tuple(edited(run) for run in step.branches)))
            case Map() | Exit():
                steps.append(step)
            case _:
                assert_never(step)
    return plan.with_steps(tuple(steps), stack)
