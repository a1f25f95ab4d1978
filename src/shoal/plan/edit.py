"""Plan to plan: every verb returns a new plan and names layers by their base index."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace as with_fields

from shoal.errors import PlanError
from shoal.plan.notation import map_weights
from shoal.plan.steps import KV, Exit, Fill, Join, Map, Parallel, PartName, Plan, Run, Step, runs

_OTHER: dict[PartName, PartName] = {"attention": "mlp", "mlp": "attention"}


def drop(plan: Plan, layers: Iterable[int], *, part: PartName = "layer", stack: str | None = None) -> Plan:
    """Remove layers, or only their attention or mlp. Raises P103 when a layer does not run in the plan."""
    gone = _existing(plan, layers, stack)
    kept = [smaller for step in plan.steps(stack) for smaller in _without(step, gone, part)]
    return plan.with_steps(tuple(kept), stack)


def keep(plan: Plan, layers: Iterable[int], *, stack: str | None = None) -> Plan:
    """Keep only these layers, in the plan's own order."""
    kept = _existing(plan, layers, stack)
    return drop(plan, set(plan.layers(stack)) - kept, stack=stack)


def repeat(plan: Plan, layers: Iterable[int], times: int = 2, *, stack: str | None = None) -> Plan:
    """Run each of these layers `times` times in a row, each time with KV slots of its own."""
    if times < 1:
        raise PlanError(f"cannot repeat {times} times; give 1 or more", code="P103")
    again = _existing(plan, layers, stack)
    steps: list[Step] = []
    for step in plan.steps(stack):
        steps += [step] * (times if isinstance(step, Run) and step.layer in again else 1)
    return plan.with_steps(tuple(steps), stack)


def reorder(plan: Plan, order: Iterable[int], *, stack: str | None = None) -> Plan:
    """Run the plan's steps in this order of their layers; layers left out are dropped, named twice they repeat."""
    wanted = list(order)
    _existing(plan, wanted, stack)
    by_layer: dict[int, list[Run]] = {}
    for run in runs(plan.steps(stack)):
        by_layer.setdefault(run.layer, []).append(run)
    return plan.with_steps(tuple(run for i in wanted for run in by_layer[i]), stack)


def replace(plan: Plan, first: int, last: int, *, weights: str | None = None, stack: str | None = None) -> Plan:
    """Put a fitted map where the layers first..last ran."""
    _existing(plan, (first, last), stack)
    span = set(range(first, last + 1))
    stand_in = Map(first, last, weights or map_weights(first, last))
    steps: list[Step] = []
    for step in plan.steps(stack):
        inside = any(run.layer in span for run in runs((step,)))
        if not inside:
            steps.append(step)
        elif stand_in not in steps:
            steps.append(stand_in)
    return plan.with_steps(tuple(steps), stack)


def parallel(plan: Plan, layers: Iterable[int], *, join: Join = "sum", stack: str | None = None) -> Plan:
    """Let these neighbouring layers read one input and add up their changes. Raises P118 when they are not neighbours."""
    members = _existing(plan, layers, stack)
    steps = plan.steps(stack)
    places = [n for n, step in enumerate(steps) if isinstance(step, Run) and step.layer in members]
    if len(places) < 2 or places != list(range(places[0], places[-1] + 1)):
        raise PlanError(f"layers {sorted(members)} do not stand next to each other in {plan}", code="P118")
    group = Parallel(tuple(step for step in steps if isinstance(step, Run) and step.layer in members), join)
    return plan.with_steps((*steps[: places[0]], group, *steps[places[-1] + 1 :]), stack)


def share_kv(plan: Plan, layer: int, source: int, *, stack: str | None = None) -> Plan:
    """Let `layer` attend to the keys and values of the earlier layer `source` and store none of its own."""
    _existing(plan, (layer, source), stack)
    return _edit_runs(plan, {layer}, stack, lambda run: with_fields(run, kv=KV(source, run.kv.fill)))


def gate(plan: Plan, layers: Iterable[int], *, fill: Fill | None = None, stack: str | None = None) -> Plan:
    """Put a gate called skip.LAYER on each of these layers, for a policy to decide at run time."""
    return _edit_runs(
        plan,
        _existing(plan, layers, stack),
        stack,
        lambda run: with_fields(run, gate=f"skip.{run.layer}", kv=KV(run.kv.read, fill)),
    )


def exit_at(plan: Plan, after: int, *, name: str | None = None, head: str = "base", stack: str | None = None) -> Plan:
    """Put an exit behind the last run of layer `after`, gated as exit.AFTER."""
    _existing(plan, (after,), stack)
    steps = list(plan.steps(stack))
    place = max(n for n, step in enumerate(steps) if any(run.layer == after for run in runs((step,))))
    steps.insert(place + 1, Exit(name or f"exit-{after}", head, f"exit.{after}"))
    return plan.with_steps(tuple(steps), stack)


def _existing(plan: Plan, layers: Iterable[int], stack: str | None) -> set[int]:
    wanted, there = set(layers), set(plan.layers(stack))
    for layer in sorted(wanted - there):
        raise PlanError(
            f"layer {layer} does not run in the plan {plan} (stack {plan.stack_name(stack)}, "
            f"{plan.depth(stack)} base layers, 0-based); name layers that do",
            code="P103",
        )
    return wanted


def _without(step: Step, gone: set[int], part: PartName) -> tuple[Step, ...]:
    match step:
        case Run():
            return tuple(_shrink(step, gone, part))
        case Parallel():
            branches = tuple(left for run in step.branches for left in _shrink(run, gone, part))
            return (Parallel(branches, step.join),) if len(branches) > 1 else branches
        case Map() | Exit():
            return (step,)


def _shrink(run: Run, gone: set[int], part: PartName) -> list[Run]:
    if run.layer not in gone:
        return [run]
    if part == "layer" or run.part == part:
        return []
    return [with_fields(run, part=_OTHER[part])] if run.part == "layer" else [run]


def _edit_runs(plan: Plan, layers: set[int], stack: str | None, change) -> Plan:  # type: ignore[no-untyped-def]
    def edited(step: Step) -> Step:
        match step:
            case Run():
                return change(step) if step.layer in layers else step  # type: ignore[no-any-return]
            case Parallel():
                return Parallel(tuple(change(b) if b.layer in layers else b for b in step.branches), step.join)
            case Map() | Exit():
                return step

    return plan.with_steps(tuple(edited(step) for step in plan.steps(stack)), stack)
