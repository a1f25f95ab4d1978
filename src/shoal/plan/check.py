"""Is this plan legal for this model? Every answer has a code, names the layer and the value, and says what to do.

P101 made for another model          P102 unknown stack             P103 layer out of range
P104 no step left                    P105 layer has no such part    P106 no layer left that counts tokens
P107 KV source does not run          P108 KV shapes differ          P109 layer has no KV to share
P110 layer must run first            P111 a layer it reads is gone  P112 weights missing
P113 weights of the wrong shape      P114 bad span                  P115 exit that hides steps, or named twice
P116 KV fill that has no use         P117 unwritable name or word   P118 bad parallel group
P119 a recurrent layer has no fill   P120 edit that this plan does not allow
P127 matrices that do not fit the tied layer                       P128 source that takes over a map
P129 a run's own tensors do not fit its layer                      P164 what a later run cannot give
P165 a head reads a layer that does not run

P102, P104 and P117 come from `Plan` and the steps themselves, P120 from `shoal.plan.edit`; `check` finds the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import assert_never

from shoal.errors import PlanError
from shoal.plan.answers import NO_PARTS
from shoal.plan.given import Given, given_plan
from shoal.plan.heads import unfit_heads
from shoal.plan.later import later_sources, unfit_later
from shoal.plan.notation import format_steps
from shoal.plan.plan import Plan
from shoal.plan.select import exits, groups, maps, run_of
from shoal.plan.sources import STORED, AttentionMap, LayerKeys, LayerKV, LayerSource, LayerValues, TiedLayer
from shoal.plan.spec import LayerSpec, Spec, StackSpec
from shoal.plan.steps import Run, Step, map_source, runs, writes_kv
from shoal.plan.tensors import Finding, Layers, Shapes, map_tensors, missing_tensors, unfit_tensors
from shoal.plan.ties import missing_stacks, unfit_ties


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a plan is refused."""

    code: str
    stack: str
    layer: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def check(plan: Given, spec: Spec, weights: Shapes | None = None, layers: Layers | None = None) -> list[Problem]:
    """All problems of `plan` on `spec`: a Plan, depth notation or the place of a plan.json.

    `weights`: the shape of each new tensor by name (`ID.weight`, ...). `layers`: by stack and layer the shapes of what
    that layer holds, by its names there; a Spec knows none, so without them nobody asks whether a run's own tensors
    fit (P129). Who has the model gives `shoal.executing.weights.shapes_in`.
    """
    plan = plan if isinstance(plan, Plan) else given_plan(plan, Plan.identity(spec))
    if other := _other_model(plan, spec):
        return [Problem("P101", "", None, other)]
    problems: list[Problem] = []
    for stack in spec.stacks:
        steps = plan.steps(stack.name)
        found = [*_range(steps, stack), *missing_stacks(steps, spec)] or [
            *_parts(steps, stack, spec.parts_note),
            *(finding for rule in _RULES for finding in rule(steps, stack)),
            *map_tensors(steps, stack, weights or {}),
            *missing_tensors(steps, weights or {}),
            *unfit_heads(steps, stack, spec.vocab, weights or {}),
            *unfit_tensors(steps, stack, weights or {}, layers),
            *unfit_ties(plan, stack, spec, layers),
            *unfit_later(steps),
        ]
        problems += [Problem(code, stack.name, layer, message) for code, layer, message in found]
    return problems


def require(plan: Plan, spec: Spec, weights: Shapes | None = None, layers: Layers | None = None) -> Plan:
    """The plan itself when `check` finds nothing; otherwise raises `PlanError` with the first problem and how many
    more."""
    problems = check(plan, spec, weights, layers)
    if not problems:
        return plan
    more = f" (and {len(problems) - 1} more: {', '.join(p.code for p in problems[1:4])})" if len(problems) > 1 else ""
    raise PlanError(problems[0].message + more, code=problems[0].code)


def _other_model(plan: Plan, spec: Spec) -> str | None:
    here = tuple((stack.name, stack.depth) for stack in spec.stacks)
    if (plan.base.fingerprint, plan.base.depths) == (spec.fingerprint, here):
        return None
    return (
        f"this plan was made for another model ({plan.base.family} with {_counts(plan.base.depths)}, "
        f"{plan.base.fingerprint[:15]}), not for {spec.family} with {_counts(here)} ({spec.fingerprint[:15]}); "
        "make a plan for this model"
    )


def _counts(depths: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{depth} {name} layers" for name, depth in depths)


def _range(steps: tuple[Step, ...], stack: StackSpec) -> Iterator[Finding]:
    named = [(run.layer, "layer") for run in runs(steps)]
    named += [(one.layer, one.noun) for run in runs(steps) for one in run.layer_sources]
    named += [(run.tied_layer, TiedLayer.noun) for run in runs(steps) if run.tied_layer is not None]
    named += [(end, "end of a map") for one in maps(steps) for end in (one.first, one.last)]
    for layer, what in named:
        if not 0 <= layer < stack.depth:
            there = f"{stack.name} layers are 0 to {stack.depth - 1} (0-based, {stack.path})"
            yield "P103", layer, f"{what} {layer} does not exist; {there}"
    for one in maps(steps):
        if one.first > one.last:
            right = f"~{one.last}-{one.first}"
            yield "P114", one.first, f"the map ~{one.first}-{one.last} must go upwards; write {right}"


def _parts(steps: tuple[Step, ...], stack: StackSpec, note: str | None) -> Iterator[Finding]:
    for run in runs(steps):
        layer = stack.layers[run.layer]
        # with one part missing, "only the other part" is the layer itself: say so rather than do it in silence
        if run.part != "layer" and None in (layer.attention, layer.mlp):
            why = note or f"its kind is {layer.kind}"
            words = {"stack": stack.name, "layer": run.layer, "part": run.part, "why": why}
            yield NO_PARTS.code, run.layer, NO_PARTS.sentence.format(**words)


def _counting(steps: tuple[Step, ...], stack: StackSpec) -> Iterator[Finding]:
    """The cache counts tokens in a layer that stores KV; without one, positions are silently wrong."""
    counting = [layer.index for layer in stack.layers if layer.kv.per_token]
    if counting and not any(writes_kv(run) and run.layer in counting for run in runs(steps)):
        yield (
            "P106",
            None,
            f"no {stack.name} layer that stores KV is left, so nothing counts the tokens in the cache; "
            f"keep one whole, for example {counting[0]}",
        )


def _sources(steps: tuple[Step, ...], stack: StackSpec) -> Iterator[Finding]:
    """Whether what a run takes from another layer is there and fits."""
    before, later = _Before(), {(position, source) for position, _, source in later_sources(steps)}
    for position, step in enumerate(steps):
        group = list(runs((step,)))
        for run in group:
            for source in run.layer_sources:
                yield from _source(run, source, stack, before, later=(position, source) in later)
        before.keys.update(run.layer for run in group if "keys" in run.stores)
        before.values.update(run.layer for run in group if "values" in run.stores)
        before.maps.update({run.layer: map_source(run) is None for run in group if run.part != "mlp"})


@dataclass(frozen=True, slots=True)
class _Before:
    """What has run when a step begins."""

    keys: set[int] = field(default_factory=set)
    """The layers that have stored keys of their own."""
    values: set[int] = field(default_factory=set)
    """The layers that have stored values of their own."""
    maps: dict[int, bool] = field(default_factory=dict)
    """The layers whose attention has run, and whether it made its map itself."""


def _source(
    run: Run, source: LayerSource, stack: StackSpec, before: _Before, *, later: bool = False
) -> Iterator[Finding]:
    both = layer, other = stack.layers[run.layer], stack.layers[source.layer]
    here = f"layer {run.layer} {source}"
    taken_over = False
    facts: list[tuple[object, ...]]
    match source:
        case LayerKV():
            mark, lacks, absent = "@", "has no KV to share", "which does not run with KV of its own in another step"
            there, facts = source.layer in before.keys & before.values, [(one.kv, one.kind) for one in both]
        case LayerKeys():
            mark, lacks, absent = "@k", "has no keys to share", "which stores no keys of its own before it"
            there, facts = source.layer in before.keys, [(replace(one.kv, value_dim=0), one.kind) for one in both]
        case LayerValues():
            mark, lacks, absent = "@v", "has no values to share", "which stores no values of its own before it"
            there = source.layer in before.values
            facts = [(replace(one.kv, key_dim=0, rotated=False), one.kind) for one in both]
        case AttentionMap():
            mark, lacks, absent = "@a", "makes no map", "whose attention does not run before it"
            there, facts = source.layer in before.maps, [(one.kv, one.kind, one.width) for one in both]
            taken_over = not before.maps.get(source.layer, True)
        case _:
            assert_never(source)
    if run.part == "mlp":
        yield "P109", run.layer, f"{here}, but runs only its mlp; write {run.layer}m without {mark}"
    elif none := next((one for one in both if one.kv.kind not in ("full", "sliding")), None):
        yield "P109", none.index, f"{here}, but layer {none.index} ({none.kind}) {lacks}; drop the {mark}"
    elif source.gives != STORED and not (layer.kv.apart and other.kv.apart):
        why = "keeps keys and values as one latent state, of which neither can be taken alone"
        yield "P109", run.layer, f"{here}, but layer {run.layer} {why}; share both, as in {run.layer}@{source.layer}"
    else:
        if not there and not later:
            which = "a layer" if isinstance(source, LayerKV) else "an earlier layer"
            yield "P107", run.layer, f"{here}, {absent}; choose {which} that does"
        if taken_over:
            yield "P128", run.layer, f"{here}, which takes over a map itself; name the layer that makes it"
        if facts[0] != facts[1]:
            turns = layer.kv.rotated != other.kv.rotated
            differ = f"{_kv_words(layer, turns)} and {_kv_words(other, turns)}"
            yield "P108", run.layer, f"{here}, but the two differ: {differ}; choose a source of the same kind"


def _kv_words(layer: LayerSpec, turns: bool) -> str:
    window = f", window {layer.kv.window}" if layer.kv.window is not None else ""
    size = f"{layer.kv.heads} x ({layer.kv.key_dim} + {layer.kv.value_dim})"
    turned = f" and {'keys that turn' if layer.kv.rotated else 'no key that turns'} with the position" if turns else ""
    return f"{layer.index} is {layer.kind} with {size}{window}{turned}"


def _pinned(steps: tuple[Step, ...], stack: StackSpec) -> Iterator[Finding]:
    first = run_of(steps[0])
    leader = first.layer if first is not None and first.part != "mlp" and first.gate is None else None
    for layer in stack.layers:
        if layer.pinned is not None and leader != layer.index:
            yield (
                "P110",
                layer.index,
                f"{stack.name} layer {layer.index} must run first: {layer.pinned}; "
                f"begin the plan with {layer.index}, with its attention and without a gate",
            )


def _native_sharing(steps: tuple[Step, ...], stack: StackSpec) -> Iterator[Finding]:
    stored: set[int] = set()
    for step in steps:
        group = list(runs((step,)))
        for run in group:
            for source in stack.layers[run.layer].needs:
                if source not in stored and run.part != "mlp":
                    yield (
                        "P111",
                        run.layer,
                        f"{stack.name} layer {run.layer} reads the state of layer {source} in this family, which does "
                        f"not run before it with a state of its own; keep {source} or drop {run.layer}",
                    )
        stored |= {run.layer for run in group if writes_kv(run)}


def _exits(steps: tuple[Step, ...], stack: StackSpec) -> Iterator[Finding]:
    names: set[str] = set()
    for position, step in enumerate(steps):
        for one in exits((step,)):
            if one.name in names:
                yield "P115", None, f"two {stack.name} exits are called {one.name!r}; rename one"
            names.add(one.name)
            if one.gate is None and position < len(steps) - 1:
                hidden = format_steps(steps[position + 1 :])
                why = f"exit {one.name!r} has no gate, so {hidden:.60} behind it never runs; remove one of them"
                yield "P115", None, why


def _fills(steps: tuple[Step, ...], stack: StackSpec) -> Iterator[Finding]:
    for run, skippable in _skippable(steps):
        if run.kv.fill is None:
            continue
        here, kv = f"{stack.name} layer {run.layer} has the KV fill {run.kv.fill!r}", stack.layers[run.layer].kv
        if kv.kind == "recurrent" and writes_kv(run):
            yield (
                "P119",
                run.layer,
                f"{here}, but keeps a recurrent state, which stands still when skipped; drop the fill",
            )
        elif not writes_kv(run) or not kv.per_token:
            yield "P116", run.layer, f"{here}, but stores no KV of its own; drop the fill"
        elif not skippable:
            yield "P116", run.layer, f"{here} but no gate that could skip it; write {run.layer}?GATE/{run.kv.fill}"


def _skippable(steps: tuple[Step, ...]) -> Iterator[tuple[Run, bool]]:
    """Every run, and whether a gate of its own or an exit before it may keep tokens from it."""
    behind = False
    for step in steps:
        behind = behind or any(one.gate is not None for one in exits((step,)))
        for run in runs((step,)):
            yield run, behind or run.gate is not None


def _groups(steps: tuple[Step, ...], stack: StackSpec) -> Iterator[Finding]:
    for one in groups(steps):
        if len(one.branches) < 2:
            group = format_steps((one,))
            yield "P118", None, f"the parallel group {group} in {stack.name} needs two branches or more, as in (7|8)"
        for run in one.branches if one.join == "bypass" else ():
            if run.part != "layer":
                group = format_steps((one,))
                why = f"the group {group} lets mlps see attentions, and {format_steps((run,))} is one of these alone"
                yield "P149", run.layer, f"{why}; write whole layers, as in (7|8)bypass"
            else:
                yield from _parts((Run(run.layer, "attention"),), stack, None)


_RULES = (_counting, _sources, _pinned, _native_sharing, _exits, _fills, _groups)
