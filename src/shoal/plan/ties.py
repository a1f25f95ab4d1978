"""Do the matrices of a tied layer fit where a plan puts them? Sizes are asked, not values: P127."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shoal.plan.spec import LayerSpec, PartSpec, StackSpec
from shoal.plan.steps import Run, Step, runs
from shoal.plan.tensors import Finding, Layers


def matrices_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Those of two dimensions and more: what a tie speaks of."""
    return {name: shape for name, shape in shapes.items() if len(shape) > 1}


def unfit_ties(steps: tuple[Step, ...], stack: StackSpec, layers: Layers | None) -> Iterator[Finding]:
    """P127 for a layer that is tied to itself, to one that is tied itself, or to one of other matrices.

    Matrices are compared one by one, by name and shape, where `layers` tells them; else by their number of elements.
    """
    tied = {run.layer for run in runs(steps) if run.tied_layer is not None}
    for run in runs(steps):
        if run.tied_layer is None:
            continue
        here = f"layer {run.layer} should run with the matrices of layer {run.tie}"
        if run.tie == run.layer:
            yield "P127", run.layer, f"{here}, which are its own; write {run.layer}"
        elif run.tie in tied:
            why = f"{here}, which is tied itself; name the layer whose matrices they are"
            yield "P127", run.layer, why
        elif differ := _differ(run, run.tied_layer, stack, layers):
            yield "P127", run.layer, f"{here}, but {differ}; tie layers of one structure"


def _differ(run: Run, tie: int, stack: StackSpec, layers: Layers | None) -> str | None:
    """How the matrices of the two differ; None where they fit."""
    own, other = stack.layers[run.layer], stack.layers[tie]
    sizes = _size(own, run), _size(other, run)
    if sizes[0] != sizes[1]:
        return f"the matrices of layer {run.layer} have {sizes[0]:,} numbers and those of layer {tie} {sizes[1]:,}"
    if layers is None:
        return None
    mine, theirs = (matrices_of(layers(stack.name, layer)) for layer in (run.layer, tie))
    if run.part != "layer":
        inside = tuple(f"{name}." for part in _parts(own, run) for name in part.modules)
        mine, theirs = ({n: s for n, s in held.items() if n.startswith(inside)} for held in (mine, theirs))
    for name in sorted(mine.keys() | theirs.keys()):
        if name in mine and name in theirs and mine[name] != theirs[name]:
            return f"{name} is {list(mine[name])} in layer {run.layer} and {list(theirs[name])} in layer {tie}"
    return None


def _parts(layer: LayerSpec, run: Run) -> list[PartSpec]:
    """The parts of the layer that the run calls, as far as they are known apart."""
    by_name = {"attention": layer.attention, "mlp": layer.mlp}
    return [part for name, part in by_name.items() if part is not None and run.part in ("layer", name)]


def _size(layer: LayerSpec, run: Run) -> int:
    """Elements of the matrices that the run reads."""
    if run.part == "layer":
        return layer.params - layer.vectors
    return sum(part.params - part.vectors for part in _parts(layer, run))
