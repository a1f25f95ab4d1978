"""Whether gates, exits and fills of a plan can be decided on one model, or by which code they are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from shoal.deciding.forward import kv_kind
from shoal.deciding.layer_arguments import Arguments
from shoal.deciding.policy import Policy
from shoal.errors import PlanError
from shoal.models.examine import LayerFacts, StackFacts
from shoal.models.kinds import is_causal
from shoal.plan import Exit, Map, Parallel, Run, Spec, Step, format_steps
from shoal.plan.capabilities import refusal, refused
from shoal.plan.later import later_sources
from shoal.plan.notation import format_source
from shoal.plan.select import run_of
from shoal.plan.spec import LayerSpec
from shoal.plan.steps import gate_of, layers_read, runs, writes_kv


def require_decidable(policy: Policy, spec: Spec, model: object, probe: StackFacts) -> None:
    """Raise `PlanError` for what cannot be decided while this model runs: P130 no causal decoder, P131 recurrent
    layers, P132 gated groups or maps, P133 KV that others read
    or that is read of later runs, P134 a fill that is missing, P135 defer, P136 copy."""
    if not is_causal(model) or [name for name, _ in policy.plan.stacks] != ["decoder"]:  # type: ignore[arg-type]
        no = refused("gate", "beside_encoder", policy.plan.steps()[0], model=type(model).__name__)
        assert no is not None
        raise PlanError(no.message, code=no.code)
    layers, steps = spec.stack().layers, policy.plan.steps()
    _require_earlier(steps)
    read = layers_read(steps) | {source for run in runs(steps) for source in layers[run.layer].needs}
    skippable = {run.layer for step, _ in _skippable(steps) for run in runs((step,))}
    for step, behind in _skippable(steps):
        _require_plain(step, gate_of(step) is not None)
        for run in runs((step,)):
            if policy.leaves_out == "mlp" and run.gate is not None:
                _require_parts(run, probe.layers[run.layer])
                if not behind:
                    continue
            _require_attention(run, layers[run.layer], spec.family)
            _require_kept_kv(run, read, skippable)
            if writes_kv(run) and layers[run.layer].kv.per_token:
                _require_fill(run, policy, probe.layers[run.layer], behind)
    _require_sources(steps, probe)


def _require_earlier(steps: tuple[Step, ...]) -> None:
    """Passes go over the steps again, and a policy would decide anew in each."""
    for _, run, _ in later_sources(steps):
        if no := refused("later source", "gated", run):
            raise PlanError(no.message, code=no.code)


def _skippable(steps: tuple[Step, ...]) -> Iterator[tuple[Step, bool]]:
    """Steps that some token may skip, and whether they are behind a gated exit."""
    behind = False
    for step in steps:
        match step:
            case Exit():
                behind = behind or step.gate is not None
            case Run() | Map() | Parallel():
                if behind or gate_of(step) is not None:
                    yield step, behind
            case _:
                assert_never(step)


def _require_plain(step: Step, gated: bool) -> None:
    match step:
        case Run():
            return
        case Map() if not gated:
            return  # a map is cheap enough to be made for those that left as well
        case Map() | Parallel() | Exit():
            if no := refusal((step,), "gated"):
                raise PlanError(no.message, code=no.code)
        case _:
            assert_never(step)


def _require_parts(run: Run, fact: LayerFacts) -> None:
    if fact.parts is None or run.part != "layer":
        raise PlanError(
            f"no mlp is known apart from the rest of layer {run.layer}, so none can be left out; choose a policy that "
            "skips whole layers",
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


def _require_kept_kv(run: Run, read: set[int], skippable: set[int]) -> None:
    """Keys and values that another run reads are there for every token; a run that reads some stores none itself."""
    if no := refusal((run,), "gated"):
        raise PlanError(no.message, code=no.code)
    if (source := next((one for one in run.layer_sources if one.layer in skippable), None)) is not None:
        raise PlanError(
            f"layer {run.layer} {source}, which some token may skip; write the plan without "
            f"{format_source(source)}, or let no gate and no exit decide about layer {source.layer}",
            code="P133",
        )
    if run.layer in read and (run.gate is not None or run.kv.fill in (None, "mask")):
        raise PlanError(
            f"layer {run.layer} shares its keys and values with another layer, so no token can be without them; write "
            "the plan without @, or let tokens leave with the fill project",
            code="P133",
        )


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
        match step:
            case Exit():
                behind = behind or step.gate is not None
                continue
            case Run() | Map() | Parallel():
                own = run_of(step)
            case _:
                assert_never(step)
        for run in runs((step,)):
            fact = probe.layers[run.layer]
            if run.kv.fill == "copy":
                _require_source(run, [probe.layers[layer] for layer in always], fact)
            if writes_kv(run) and not behind and run.gate is None:
                always.append(run.layer)
        deferred = deferred or any(run.kv.fill == "defer" for run in runs((step,)))
        if deferred and (own is None or own.kv.fill != "defer"):
            raise PlanError(
                f"{format_steps((step,))} stores no keys and values that would show that it must run later; "
                "with the fill defer every step behind the exit must, so take project",
                code="P135",
            )


def _require_source(run: Run, always: list[LayerFacts], fact: LayerFacts) -> None:
    if fact.cache_at is None or not any(kv_kind(other) == kv_kind(fact) for other in always):
        raise PlanError(
            f"layer {run.layer} would copy keys and values, but no layer of its kind runs for every token "
            "before it; take the fill project",
            code="P136",
        )


def require_masks(steps: tuple[Step, ...], arguments: Arguments) -> None:
    """Raise P137 for a layer whose mask a fill must edit and that is handed none."""
    for run in runs(steps):
        if run.kv.fill in ("mask", "defer") and arguments.masks[run.layer] is None:
            raise PlanError(
                f"layer {run.layer} is handed no attention mask that could be replaced, which the fill "
                f"{run.kv.fill} needs; take the fill project",
                code="P137",
            )
