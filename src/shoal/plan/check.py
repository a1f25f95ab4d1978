"""Is this plan legal for this model? Every answer has a code, names the layer and the value, and says what to do.

P101 made for another model          P102 unknown stack             P103 layer out of range
P104 no step left                    P105 layer has no such part    P106 no layer left that counts tokens
P107 KV source does not run before   P108 KV shapes differ          P109 layer has no KV to share
P110 layer must run first            P111 a layer it reads is gone  P112 weights missing
P113 weights of the wrong shape      P114 bad span                  P115 steps behind an exit that is always taken
P116 KV fill without a gate          P118 bad parallel group        P119 a recurrent layer cannot do this
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from shoal.errors import PlanError
from shoal.plan.spec import LayerSpec, Spec, StackSpec
from shoal.plan.steps import Exit, Map, Parallel, Plan, Run, Step, runs, writes_kv

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a plan is refused."""

    code: str
    stack: str
    layer: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def check(plan: Plan, spec: Spec, weights: Shapes | None = None) -> list[Problem]:
    """All problems of `plan` on `spec`; `weights` gives the shape of each new tensor by name (`ID.weight`, ...)."""
    if problems := list(_other_model(plan, spec)):
        return problems
    found: list[Problem] = []
    for stack in spec.stacks:
        steps = plan.steps(stack.name)
        if outside := list(_range(steps, stack)):
            found += outside
            continue
        for rule in (_parts, _counting, _kv_source, _pinned, _native_sharing, _exits, _fills, _groups):
            found += rule(steps, stack, spec)
        found += _weights(steps, stack, weights or {})
    return found


def require(plan: Plan, spec: Spec, weights: Shapes | None = None) -> Plan:
    """The plan itself when it is legal; otherwise raises `PlanError` with the first problem and how many more."""
    problems = check(plan, spec, weights)
    if not problems:
        return plan
    more = f" (and {len(problems) - 1} more: {', '.join(p.code for p in problems[1:4])})" if len(problems) > 1 else ""
    raise PlanError(problems[0].message + more, code=problems[0].code)


def _other_model(plan: Plan, spec: Spec) -> Iterator[Problem]:
    depths = dict(plan.base.depths)
    here = {stack.name: stack.depth for stack in spec.stacks}
    if plan.base.fingerprint == spec.fingerprint and depths == here:
        return
    made = f"{plan.base.family} with {_counts(depths)}"
    yield Problem(
        "P101",
        "",
        None,
        f"this plan was made for another model ({made}, {plan.base.fingerprint[:15]}), not for {spec.family} with "
        f"{_counts(here)} ({spec.fingerprint[:15]}); make a plan for this model",
    )


def _counts(depths: Mapping[str, int]) -> str:
    return ", ".join(f"{depth} {name} layers" for name, depth in depths.items())


def _range(steps: Iterable[Step], stack: StackSpec) -> Iterator[Problem]:
    named = [(run.layer, "layer") for run in runs(tuple(steps))]
    named += [(run.kv.read, "KV source") for run in runs(tuple(steps)) if run.kv.read is not None]
    named += [(end, "end of a map") for step in steps if isinstance(step, Map) for end in (step.first, step.last)]
    for layer, what in named:
        if not 0 <= layer < stack.depth:
            yield Problem(
                "P103",
                stack.name,
                layer,
                f"{what} {layer} does not exist: {stack.name} layers are 0 to {stack.depth - 1} (0-based, {stack.path})",
            )
    for step in steps:
        if isinstance(step, Map) and step.first > step.last:
            yield Problem("P114", stack.name, step.first, f"the map ~{step.first}-{step.last} must go upwards")


def _parts(steps: tuple[Step, ...], stack: StackSpec, spec: Spec) -> Iterator[Problem]:
    for run in runs(steps):
        layer = stack.layers[run.layer]
        wanted = {"layer": layer, "attention": layer.attention, "mlp": layer.mlp}[run.part]
        # with one part missing, "only the other part" is the layer itself: say so rather than do it in silence
        if wanted is None or (run.part != "layer" and None in (layer.attention, layer.mlp)):
            why = spec.parts_note or f"its kind is {layer.kind}"
            yield Problem(
                "P105",
                stack.name,
                run.layer,
                f"{stack.name} layer {run.layer} cannot run its {run.part} alone: {why}; "
                f"run the whole layer ({run.layer}) or drop it",
            )


def _counting(steps: tuple[Step, ...], stack: StackSpec, spec: Spec) -> Iterator[Problem]:
    """The cache counts tokens in a layer that stores KV; without one, positions are silently wrong."""
    if not any(layer.kv.per_token for layer in stack.layers):
        return
    if not any(writes_kv(run) and stack.layers[run.layer].kv.per_token for run in runs(steps)):
        first = next(layer.index for layer in stack.layers if layer.kv.per_token)
        yield Problem(
            "P106",
            stack.name,
            None,
            f"no {stack.name} layer with attention is left, so nothing counts the tokens in the cache; "
            f"keep one, for example {first}a",
        )


def _kv_source(steps: tuple[Step, ...], stack: StackSpec, spec: Spec) -> Iterator[Problem]:
    stored: set[int] = set()
    for step in steps:
        group = runs((step,))
        for run in group:
            if run.kv.read is not None:
                yield from _one_source(run, stack, stored)
        stored |= {run.layer for run in runs((step,)) if writes_kv(run)}


def _one_source(run: Run, stack: StackSpec, stored: set[int]) -> Iterator[Problem]:
    assert run.kv.read is not None
    layer, source = stack.layers[run.layer], stack.layers[run.kv.read]
    here = f"{stack.name} layer {run.layer} reads the KV of layer {source.index}"
    if run.part == "mlp":
        yield Problem("P109", stack.name, run.layer, f"{here}, but runs only its mlp; write {run.layer}m without @")
        return
    for one in (layer, source):
        if one.kv.kind not in ("full", "sliding"):
            yield Problem(
                "P109", stack.name, one.index, f"{here}, but layer {one.index} ({one.kind}) has no KV to share; drop the @"
            )
            return
    if source.index not in stored:
        yield Problem(
            "P107",
            stack.name,
            run.layer,
            f"{here}, which does not run before it with KV of its own; choose an earlier layer that does",
        )
    if (layer.kv, layer.kind) != (source.kv, source.kind):
        yield Problem(
            "P108",
            stack.name,
            run.layer,
            f"{here}, but the two differ: {_kv_words(layer)} and {_kv_words(source)}; choose a source of the same kind",
        )


def _kv_words(layer: LayerSpec) -> str:
    window = f", window {layer.kv.window}" if layer.kv.window is not None else ""
    return f"{layer.index} is {layer.kind} with {layer.kv.heads} x {layer.kv.key_dim}{window}"


def _pinned(steps: tuple[Step, ...], stack: StackSpec, spec: Spec) -> Iterator[Problem]:
    order = [run.layer for run in runs(steps)]
    for layer in stack.layers:
        if layer.pinned is not None and order[:1] != [layer.index]:
            yield Problem(
                "P110",
                stack.name,
                layer.index,
                f"{stack.name} layer {layer.index} must run first: {layer.pinned}; begin the plan with {layer.index}",
            )


def _native_sharing(steps: tuple[Step, ...], stack: StackSpec, spec: Spec) -> Iterator[Problem]:
    seen: set[int] = set()
    for run in runs(steps):
        for source in stack.layers[run.layer].needs:
            if source not in seen and run.part != "mlp":
                yield Problem(
                    "P111",
                    stack.name,
                    run.layer,
                    f"{stack.name} layer {run.layer} reads the state of layer {source} in this family, which does not "
                    f"run before it; keep {source} or drop {run.layer}",
                )
        if run.part != "mlp":
            seen.add(run.layer)


def _exits(steps: tuple[Step, ...], stack: StackSpec, spec: Spec) -> Iterator[Problem]:
    names: set[str] = set()
    for position, step in enumerate(steps):
        if not isinstance(step, Exit):
            continue
        if step.name in names:
            yield Problem("P115", stack.name, None, f"two exits are called {step.name!r}; rename one")
        names.add(step.name)
        if step.gate is None and position < len(steps) - 1:
            yield Problem(
                "P115", stack.name, None, f"exit {step.name!r} has no gate, so the steps behind it never run; remove them"
            )


def _fills(steps: tuple[Step, ...], stack: StackSpec, spec: Spec) -> Iterator[Problem]:
    for run in runs(steps):
        if run.kv.fill is not None and run.gate is None:
            yield Problem(
                "P116",
                stack.name,
                run.layer,
                f"{stack.name} layer {run.layer} has the KV fill {run.kv.fill!r} but no gate that could skip it; "
                f"write {run.layer}?GATE/{run.kv.fill}",
            )


def _groups(steps: tuple[Step, ...], stack: StackSpec, spec: Spec) -> Iterator[Problem]:
    for step in steps:
        if isinstance(step, Parallel) and len(step.branches) < 2:
            yield Problem("P118", stack.name, None, "a parallel group needs at least two branches, as in (7|8)")


def _weights(steps: tuple[Step, ...], stack: StackSpec, shapes: Shapes) -> Iterator[Problem]:
    size = stack.hidden
    for step in steps:
        if not isinstance(step, Map):
            continue
        weight, down, up, bias = (
            shapes.get(f"{step.weights}.{name}") for name in ("weight", "down", "up", "bias")
        )
        if weight is None and (down is None or up is None):
            yield Problem(
                "P112",
                stack.name,
                step.first,
                f"the map for layers {step.first}-{step.last} needs the tensor {step.weights}.weight; fit it first",
            )
        wanted = {"weight": (weight, (size, size)), "bias": (bias, (size,))}
        for name, (found, right) in wanted.items():
            if found is not None and found != right:
                yield Problem(
                    "P113",
                    stack.name,
                    step.first,
                    f"{step.weights}.{name} has shape {list(found)}; {stack.name} needs {list(right)}",
                )
        if down is not None and up is not None and (down[1:] != (size,) or up[:1] != (size,) or down[:1] != up[1:]):
            yield Problem(
                "P113",
                stack.name,
                step.first,
                f"{step.weights}.down {list(down)} and .up {list(up)} must be [rank, {size}] and [{size}, rank]",
            )
    for run in runs(steps):
        if run.weights is not None and not any(name.startswith(f"{run.weights}.") for name in shapes):
            yield Problem(
                "P112",
                stack.name,
                run.layer,
                f"layer {run.layer} should run with the weights {run.weights!r}, which are not given; remove :{run.weights}",
            )
