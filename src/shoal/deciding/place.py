"""Putting gates and exits into a plan, and asking whether they can be decided on this model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from shoal.deciding.gates import Policy, Schedule
from shoal.errors import PlanError, UsageError
from shoal.models.examine import LayerFacts, StackFacts
from shoal.models.kinds import is_causal
from shoal.plan import Exit, Map, Plan, Run, Spec, Step, format_steps
from shoal.plan.capabilities import refusal, refused
from shoal.plan.spec import LayerSpec
from shoal.plan.steps import KV, Fill, decides, gate_of, layers_of, layers_read, runs, undecided, writes_kv

EXIT = "exit"
"""The gate of exits that a policy places."""


def with_gates(plan: Plan, spec: Spec, layers: Iterable[int], gate: str, fill: Fill | None) -> Plan:
    """`plan` with `gate` at every run of `layers`, and `fill` where such a run stores keys and values.

    A plan that has gates or exits already is handed back as it is: who wrote them chose the places and the fills.
    Raises U581 for a layer that the plan does not run whole.
    """
    if decides(plan.steps()):
        return plan
    gated, specs, wanted = list(plan.steps()), spec.stack().layers, set(layers)
    for at, step in enumerate(gated):
        if isinstance(step, Run) and step.layer in wanted:
            gated[at] = replace(step, gate=gate, kv=_filled(step, specs[step.layer], fill))
    there = {step.layer for step in gated if isinstance(step, Run)}
    if missing := sorted(wanted - there):
        raise UsageError(
            f"the policy {gate} would decide about layer {missing[0]}, which {format_steps(plan.steps())} does not run "
            "as a step of its own; name layers of the plan",
            code="U581",
        )
    return plan.with_steps(tuple(gated))


def with_exits(plan: Plan, spec: Spec, layers: Iterable[int], fill: Fill | None, head: str = "base") -> Plan:
    """`plan` with an exit behind every one of `layers` (called after-LAYER) and `fill` for what is behind the first.

    `head`: "base", or the beginning of the ids HEAD-LAYER that name own heads or lenses. A plan with gates or exits is
    handed back as it is. Raises U581 for a layer that the plan does not run.
    """
    if decides(plan.steps()):
        return plan
    wanted, specs = set(layers), spec.stack().layers
    last = {layer: at for at, step in enumerate(plan.steps()) for layer in layers_of(step)}
    if missing := sorted(wanted - set(last)):
        raise UsageError(
            f"the exit behind layer {missing[0]} has no place, since {format_steps(plan.steps())} does not run that "
            "layer; name layers of the plan",
            code="U581",
        )
    placed: list[Step] = []
    for at, step in enumerate(plan.steps()):
        behind = any(isinstance(one, Exit) for one in placed)
        placed.append(
            replace(step, kv=_filled(step, specs[step.layer], fill)) if behind and isinstance(step, Run) else step
        )
        placed += [
            Exit(f"after-{layer}", "base" if head == "base" else f"{head}-{layer}", EXIT)
            for layer in sorted(wanted)
            if last[layer] == at
        ]
    return plan.with_steps(tuple(placed))


def exits_of(plan: Plan) -> dict[str, int]:
    """The last layer in front of each exit, by the exit's name."""
    found, last = {}, -1
    for step in plan.steps():
        if isinstance(step, Exit):
            found[step.name] = last
        else:
            last = max(layers_of(step), default=last)
    return found


def _filled(run: Run, layer: LayerSpec, fill: Fill | None) -> KV:
    stores = writes_kv(run) and layer.kv.per_token > 0
    return replace(run.kv, fill=fill) if stores else run.kv


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


def require_decidable(policy: Policy, spec: Spec, model: object, probe: StackFacts) -> None:
    """Raise `PlanError` for what cannot be decided while this model runs: P130 no causal decoder, P131 recurrent
    layers, P132 gated groups or maps, P133 KV that others read, P134 a fill that is missing, P135 defer, P136 copy."""
    if not is_causal(model) or [name for name, _ in policy.plan.stacks] != ["decoder"]:  # type: ignore[arg-type]
        no = refused("gate", "beside_encoder", policy.plan.steps()[0], model=type(model).__name__)
        assert no is not None
        raise PlanError(no.message, code=no.code)
    layers, steps = spec.stack().layers, policy.plan.steps()
    read = layers_read(steps) | {source for run in runs(steps) for source in layers[run.layer].needs}
    for step, behind in _skippable(steps):
        _require_plain(step, gate_of(step) is not None)
        for run in runs((step,)):
            if policy.leaves_out == "mlp" and run.gate is not None:
                _require_parts(run, probe.layers[run.layer])
                if not behind:
                    continue
            _require_attention(run, layers[run.layer], spec.family)
            _require_own_kv(run, read)
            if writes_kv(run) and layers[run.layer].kv.per_token:
                _require_fill(run, policy, probe.layers[run.layer], behind)
    _require_sources(steps, probe)


def _skippable(steps: tuple[Step, ...]) -> Iterator[tuple[Step, bool]]:
    """Steps that some token may skip, and whether they are behind a gated exit."""
    behind = False
    for step in steps:
        if isinstance(step, Exit):
            behind = behind or step.gate is not None
        elif behind or gate_of(step) is not None:
            yield step, behind


def _require_plain(step: Step, gated: bool) -> None:
    if isinstance(step, Run) or (isinstance(step, Map) and not gated):
        return  # a map is cheap enough to be made for those that left as well
    if no := refusal((step,), "gated"):
        raise PlanError(no.message, code=no.code)


def _require_parts(run: Run, fact: LayerFacts) -> None:
    if fact.parts is None or run.part != "layer":
        raise PlanError(
            f"layer {run.layer} has no mlp of its own that could be left out; choose a policy that skips whole layers",
            code="P105",
        )


def _require_attention(run: Run, layer: LayerSpec, family: str) -> None:
    if layer.kv.kind == "recurrent" and run.part != "mlp":
        raise PlanError(
            f"layer {run.layer} ({layer.kind}) of this {family} keeps a recurrent state, which cannot be made up for "
            "tokens that skip it; let the policy decide about layers with attention alone, and leave behind the last "
            "recurrent one",
            code="P131",
        )


def _require_own_kv(run: Run, read: set[int]) -> None:
    if run.layer_sources or (run.layer in read and (run.gate is not None or run.kv.fill in (None, "mask"))):
        no = refused("KV source", "gated", run)
        assert no is not None
        raise PlanError(no.message, code=no.code)


def _require_fill(run: Run, policy: Policy, fact: LayerFacts, behind: bool) -> None:
    here = f"layer {run.layer}"
    if run.kv.fill is None and not policy.consistent:
        raise PlanError(
            f"{here} may be skipped for one token and run for a later one, which would read keys and values that were "
            f"never stored; give it a fill, as in {run.layer}?gate/project",
            code="P134",
        )
    if run.kv.fill == "defer" and (run.gate is not None or not behind):
        raise PlanError(
            f"{here} has the fill defer, which is for layers behind an exit; a skipped layer in the middle takes "
            "project",
            code="P135",
        )
    if run.kv.fill == "defer" and (fact.window is not None or fact.carried):
        why = "forgets keys outside its window" if fact.window is not None else "is handed values by the layer before"
        raise PlanError(f"{here} {why}, so it cannot be run later for a token; take the fill project", code="P135")


def _require_sources(steps: tuple[Step, ...], probe: StackFacts) -> None:
    """What is copied must exist, and whoever waits must find all that it has skipped."""
    always: list[int] = []
    behind = deferred = False
    for step in steps:
        if isinstance(step, Exit):
            behind = behind or step.gate is not None
            continue
        for run in runs((step,)):
            fact = probe.layers[run.layer]
            if run.kv.fill == "copy":
                _require_source(run, [probe.layers[layer] for layer in always], fact)
            if writes_kv(run) and not behind and run.gate is None:
                always.append(run.layer)
        deferred = deferred or any(run.kv.fill == "defer" for run in runs((step,)))
        if deferred and not (isinstance(step, Run) and step.kv.fill == "defer"):
            raise PlanError(
                f"{format_steps((step,))} stores no keys and values that would show that it must run later; "
                "with the fill defer every step behind the exit must, so take project",
                code="P135",
            )


def _require_source(run: Run, always: list[LayerFacts], fact: LayerFacts) -> None:
    def alike(other: LayerFacts) -> bool:
        return (other.keys, other.values, other.window) == (fact.keys, fact.values, fact.window)

    if fact.cache_at is None or not any(alike(other) for other in always):
        raise PlanError(
            f"layer {run.layer} would copy keys and values, but no layer of its kind runs for every token "
            "before it; take the fill project",
            code="P136",
        )
