"""Putting gates and exits into a plan, and taking them out again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import assert_never

from shoal.deciding.policy import Schedule
from shoal.errors import UsageError
from shoal.plan import Exit, Map, Parallel, Plan, Run, Spec, Step, format_steps
from shoal.plan.select import exits, run_of
from shoal.plan.sources import KV, Fill
from shoal.plan.spec import LayerSpec
from shoal.plan.steps import decides, layers_of, undecided, writes_kv

EXIT = "exit"
"""The gate of exits that a policy places."""


def with_gates(
    plan: Plan, spec: Spec, layers: Iterable[int], gate: str | Callable[[Run], str | None], fill: Fill | None
) -> Plan:
    """`plan` with `gate`, or what it says for each (None: no gate), at every run of `layers`, and `fill` where such a
    run stores keys and values.

    A plan that has gates or exits already is handed back as it is: who wrote them chose the places and the fills.
    Raises U581 for a layer that the plan does not run whole.
    """
    if decides(plan.steps()):
        return plan
    gated, specs, wanted = list(plan.steps()), spec.stack().layers, set(layers)
    there: set[int] = set()
    for at, step in enumerate(gated):
        run = run_of(step)
        if run is not None and run.layer in wanted:
            own = gate if isinstance(gate, str) else gate(run)
            if own is not None:
                gated[at] = replace(run, gate=own, kv=filled(run, specs[run.layer], fill))
            there.add(run.layer)
    if missing := sorted(wanted - there):
        raise UsageError(
            f"a policy would decide about layer {missing[0]}, which {format_steps(plan.steps())} does not run as a "
            "step of its own; name layers of the plan",
            code="U581",
        )
    return plan.with_steps(tuple(gated))


def gate_names(beginning: str, *, again: bool = False) -> Callable[[Run], str | None]:
    """Names of gates for `with_gates`, one for each run: route-12, of its second run route-12-2, of its mlp alone
    route-12m; with `again` a layer's first run has none."""
    times: Counter[tuple[int, str]] = Counter()

    def name(run: Run) -> str | None:
        times[run.layer, run.part] += 1
        number = times[run.layer, run.part]
        own = f"{beginning}-{run.layer}{'' if run.part == 'layer' else run.part[0]}"
        return own if number == 1 and not again else f"{own}-{number}" if number > 1 else None

    return name


def with_exits(plan: Plan, spec: Spec, layers: Iterable[int], fill: Fill | None, head: str = "base") -> Plan:
    """`plan` with an exit behind every one of `layers` (called after-LAYER) and `fill` for what is behind the first.

    `head`: "base", or the beginning of the ids HEAD-LAYER that name own heads or lenses. A plan with gates or exits is
    handed back as it is. Raises U581 for a layer that the plan does not run.
    """
    if decides(plan.steps()):
        return plan
    wanted = set(layers)
    last = {layer: at for at, step in enumerate(plan.steps()) for layer in layers_of(step)}
    if missing := sorted(wanted - set(last)):
        raise UsageError(
            f"the exit behind layer {missing[0]} has no place, since {format_steps(plan.steps())} does not run that "
            "layer; name layers of the plan",
            code="U581",
        )
    found: dict[int, list[Exit]] = {}
    for layer in sorted(wanted):
        own = Exit(f"after-{layer}", "base" if head == "base" else f"{head}-{layer}", EXIT)
        found.setdefault(last[layer], []).append(own)
    return with_exits_at(plan, spec, found, fill)


def with_exits_at(plan: Plan, spec: Spec, found: Mapping[int, Iterable[Exit]], fill: Fill | None) -> Plan:
    """`plan` with these exits behind its steps, by position, and `fill` for what is behind the first of them."""
    placed: list[Step] = []
    specs = spec.stack().layers
    for at, step in enumerate(plan.steps()):
        run = run_of(step) if exits(tuple(placed)) else None
        placed.append(step if run is None else replace(run, kv=filled(run, specs[run.layer], fill)))
        placed += found.get(at, ())
    return plan.with_steps(tuple(placed))


def exits_of(plan: Plan) -> dict[str, int]:
    """The last layer in front of each exit, by the exit's name."""
    found, last = {}, -1
    for step in plan.steps():
        match step:
            case Exit():
                found[step.name] = last
            case Run() | Map() | Parallel():
                last = max(layers_of(step), default=last)
            case _:
                assert_never(step)
    return found


def filled(run: Run, layer: LayerSpec, fill: Fill | None) -> KV:
    """Where a run's keys and values come from and go, with `fill` where it stores some."""
    stores = writes_kv(run) and layer.kv.per_token > 0
    return replace(run.kv, fill=fill) if stores else run.kv


def halved(plan: Plan, spec: Spec) -> Plan:
    """The plan with the attention and the mlp of each run as steps of their own. Raises U711 for a layer whose mlp does
    not read what its attention wrote: its halves, one behind the other, are another layer."""
    if decides(plan.steps()):
        return plan
    steps: list[Step] = []
    for step in plan.steps():
        if not isinstance(step, Run) or step.part != "layer":
            steps.append(step)
            continue
        if not spec.stack().layers[step.layer].mlp_reads_attention:
            raise UsageError(
                f"part=halves needs an mlp that reads what the attention wrote, and in layer {step.layer} of "
                f"this {spec.family} that is not so; write part=layer or part=mlp",
                code="U711",
            )
        steps += [replace(step, part="attention"), replace(step, part="mlp")]
    return plan.with_steps(tuple(steps))


def fill_for(schedule: Schedule, fill: str) -> Fill | None:
    """`fill`, where "auto" is none at all when it is proved that none is needed, and "project" otherwise.

    Raises U582 for "none" where the proof fails.
    """
    if fill == "none" and not schedule.consistent:
        raise UsageError(
            "this policy runs layers again that it has skipped for an earlier token, so their keys and values must "
            "come from somewhere; give fill=project, copy or mask",
            code="U582",
        )
    if fill in ("auto", "none"):
        return None if schedule.consistent else "project"
    return fill  # type: ignore[return-value]


def ungated(plan: Plan) -> Plan:
    """The plan when nothing is skipped and nobody leaves."""
    for name, steps in plan.stacks:
        plain = undecided(steps)
        if plain:
            plan = plan.with_steps(plain, name)
    return plan
