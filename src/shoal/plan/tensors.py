"""Do the new tensors that a plan names fit its steps? Names and shapes are asked, not values.

P112 a tensor is missing   P113 a map's tensor does not fit   P129 a run's own tensor does not fit its layer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any, TypeVar

from shoal.plan.around import EMBEDDED, affine_of, around_run, is_beside, unfit_around
from shoal.plan.fewer_heads import heads_made, narrower, unlike_heads
from shoal.plan.low_rank import WORDS, factors_of, unfit_factors
from shoal.plan.neurons import resized, unlike_neurons
from shoal.plan.select import exits, maps
from shoal.plan.spec import LayerSpec, StackSpec
from shoal.plan.steps import Run, Step, added_values, ends_in, runs

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]
Layers = Callable[[str, int], Shapes]
"""By stack and base layer: the shape of each parameter and buffer that the layer holds, by its name in the layer."""
Finding = tuple[str, int | None, str]
"""(code, layer or None, message)"""

SHARES = "values"
"""ID.values [2] of a run with values beside its own (`13@v0+:ID`): the share of those, and of its own."""
MAP_TENSORS = ("weight", "bias", "gate", "down", "up", "scale", "keys", "values", "limit")
"""The tensors that a map can have, ID.NAME."""


def shapes_of(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of tensors by name; of shapes these themselves."""
    return {name: tuple(getattr(one, "shape", one)) for name, one in weights.items()}


def tensors_of(weights_id: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors of one id, or their shapes, by their names behind it."""
    start = f"{weights_id}."
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def tensors_of_run(run: Run, tensors: Mapping[str, T]) -> dict[str, T]:
    """The new tensors of a run, or their shapes, by their names in its layer: those that runs share, and over them its
    own."""
    return {name: one for weights_id in run.ids for name, one in tensors_of(weights_id, tensors).items()}


def stands_beside(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a run's tensor comes to those of its layer, in the place of none of them."""
    return name.rpartition(".")[2] in WORDS or name == SHARES or is_beside(name, shape)


def of_another_shape(layer: LayerSpec, own: Shapes) -> set[str]:
    """The names of those tensors of one run of `layer` that rightly have another shape than the layer's: fewer heads of
    keys and values, or another number of neurons."""
    return narrower(layer, own) | resized(layer, own)


def smaller_by(layer: LayerSpec, run: Run, own: Shapes) -> dict[str, int]:
    """By name how many elements less than the layer's those of the run's own tensors have that are of another shape,
    in the parts that it calls; below 0 where they have more."""
    base, silent = layer.sizes, layer.left_out(run.part)
    other = (name for name in of_another_shape(layer, own) if not name.startswith(silent))
    return {name: base[name] - prod(own[name]) for name in other}


def map_tensors(steps: tuple[Step, ...], stack: StackSpec, shapes: Shapes) -> Iterator[Finding]:
    """P112 and P113 for maps.

    A map is `weight` [hidden, hidden]; or `up` [hidden, rank] with `down` [rank, hidden], `gate` [rank, hidden] (a
    feed-forward net) or both (SwiGLU); or `scale` [hidden]; or a table, `keys` with `values` [entries, hidden].
    `bias` [hidden] or none, none of a table; `limit` [1] or none, the norm above which a token is handed on as it is.
    """
    size = stack.hidden
    for step in maps(steps):
        weight, down, up, bias = (shapes.get(f"{step.weights}.{name}") for name in ("weight", "down", "up", "bias"))
        here = f"the map for {stack.name} layers {step.first}-{step.last}"
        scale, limit, gate = (shapes.get(f"{step.weights}.{name}") for name in ("scale", "limit", "gate"))
        keys, values = (shapes.get(f"{step.weights}.{name}") for name in ("keys", "values"))
        table = keys is not None or values is not None
        if weight is None and scale is None and not table and (up is None or (down is None and gate is None)):
            yield "P112", step.first, f"{here} needs the tensor {step.weights}.weight; fit it first"
        wrong = [
            f"{step.weights}.{name} is {list(found)} instead of {list(right)}"
            for name, found, right in (
                ("weight", weight, (size, size)),
                ("bias", bias, (size,)),
                ("scale", scale, (size,)),
                ("limit", limit, (1,)),
            )
            if found is not None and found != right
        ]
        for name, inner in (("down", down), ("gate", gate)):
            if inner is not None and up is not None and (inner[1:] != (size,) or up != (size, *inner[:1])):
                pair = f"{step.weights}.{name} is {list(inner)} and .up is {list(up)}"
                wrong.append(f"{pair} instead of [rank, {size}] and [{size}, rank]")
        if table:
            wrong += _unfit_table(step.weights, tensors_of(step.weights, shapes), size)
        wrong += [
            f"{step.weights}.{name} is no tensor of a map"
            for name in tensors_of(step.weights, shapes)
            if name not in MAP_TENSORS
        ]
        for what in wrong:
            yield "P113", step.first, f"{here} does not fit: {what}; fit it on this model"


def _unfit_table(weights_id: str, own: Shapes, size: int) -> Iterator[str]:
    keys, values = own.get("keys"), own.get("values")
    if keys is None or values is None:
        yield f"{weights_id} has one of keys and values, and a table is both"
    elif keys != values or keys[1:] != (size,) or not keys[0]:
        yield f"{weights_id}.keys is {list(keys)} and .values is {list(values)} instead of [entries, {size}] both"
    beside = next((name for name in own if name in MAP_TENSORS and name not in ("keys", "values", "limit")), None)
    if beside is not None:
        yield f"{weights_id}.{beside} stands beside a table, which has keys, values and limit"


def missing_tensors(steps: tuple[Step, ...], shapes: Shapes) -> Iterator[Finding]:
    """P112 for tensors that a run or an exit's head names and that are not there; maps are `map_tensors`' question."""
    for run in runs(steps):
        for weights_id in run.ids:
            if not _given(weights_id, shapes):
                mark = ":" if weights_id == run.weights else "="
                missing = f"the weights {weights_id!r}, which are not given; remove {mark}{weights_id}"
                yield "P112", run.layer, f"layer {run.layer} should run with {missing}"
    for step in exits(steps):
        if step.head != "base" and not _given(step.head, shapes):
            missing = f"the weights {step.head!r}, which are not given; remove ={step.head}"
            yield "P112", None, f"exit {step.name!r} should read its head from {missing}"


def _given(weights: str, shapes: Shapes) -> bool:
    return any(name.startswith(f"{weights}.") for name in shapes)


def unfit_tensors(
    steps: tuple[Step, ...], stack: StackSpec, shapes: Shapes, layers: Layers | None
) -> Iterator[Finding]:
    """P129 for own tensors of a run that its layer has no place for, or that are of another shape there."""
    if layers is None:
        return
    made: dict[int, int] = {}
    for run, before in _after(steps):
        for weights_id in run.ids:
            there = layers(stack.name, run.layer)
            yield from _unfit(run, weights_id, stack, there, shapes, before)
        layer, own = stack.layers[run.layer], tensors_of_run(run, shapes)
        yield from unlike_heads(run, layer, own)
        yield from unlike_neurons(run, layer, own)
        made[run.layer] = heads_made(layer, own)
        source = added_values(run)
        if source is not None and made.get(source, made[run.layer]) != made[run.layer]:
            heads = f"{made[source]} heads of values, and layer {run.layer} {made[run.layer]}"
            yield "P129", run.layer, f"layer {source} makes {heads}, so they cannot be added; give as many for both"


def _after(steps: tuple[Step, ...]) -> Iterator[tuple[Run, set[int]]]:
    """Every run, with the layers that have run before its step."""
    before = {EMBEDDED}
    for step in steps:
        for run in runs((step,)):
            yield run, before
        before = before | ends_in(step)


def _unfit(
    run: Run, weights_id: str, stack: StackSpec, there: Shapes, shapes: Shapes, before: set[int]
) -> Iterator[Finding]:
    own = tensors_of(weights_id, shapes)
    yield from unfit_factors(run, weights_id, stack.name, there, own)
    yield from unfit_around(run, weights_id, stack.hidden, there, own, before)
    other = of_another_shape(stack.layers[run.layer], own)
    modules = (*factors_of(own, there).items(), *affine_of(own, there).items())
    beside = {*(f"{module}.{word}" for module, found in modules for word in found), *around_run(own, there)}
    for name, shape in own.items():
        if name in beside or name in other or (name == SHARES and added_values(run) is not None and shape == (2,)):
            continue
        here, layer = f"{weights_id}.{name}", f"{stack.name} layer {run.layer}"
        if name not in there:
            leaf = name.rpartition(".")[2]
            near = next((n for n in there if n.rpartition(".")[2] == leaf), next(iter(there), "none"))
            why = f"which has no tensor {name}; use its own names, such as {near}"
            yield "P129", run.layer, f"{here} is for {layer}, {why}"
        elif there[name] != shape:
            held = list(there[name])
            yield "P129", run.layer, f"{here} is {list(shape)} and {layer} holds {held} there; make it for this layer"
