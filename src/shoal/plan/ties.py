"""Do the matrices of a tied layer fit where a plan puts them? Sizes are asked, not values: P127."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shoal.plan.plan import Plan
from shoal.plan.sources import StackLayer, TiedLayer
from shoal.plan.spec import LayerSpec, PartSpec, Spec, StackSpec
from shoal.plan.steps import Run, Step, runs
from shoal.plan.tensors import Finding, Layers, Shapes


def matrices_of(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Those of two dimensions and more: what a tie speaks of."""
    return {name: shape for name, shape in shapes.items() if len(shape) > 1}


def paired_matrices(own: Shapes, other: Shapes) -> dict[str, str]:
    """By name in one layer, the matrices that it has in common with a layer of another stack, by their name there.

    Two go together that have one name and shape; of the rest those that have one shape and one name but for numbers,
    where no other has that name. So the mlp of a decoder's layer is found behind its attention to the encoder, where
    families count the parts of a layer, and that attention has nothing in an encoder. What a loaded planned checkpoint
    holds without its rows, as no run reads it, has its place all the same.
    """
    found = {name: name for name, shape in own.items() if name in other and _alike(shape, other[name])}
    mine, theirs = (_unnumbered(name for name in held if name not in found) for held in (own, other))
    for bare, names in mine.items():
        places = theirs.get(bare, [])
        if len(names) == len(places) == 1 and _alike(own[names[0]], other[places[0]]):
            found[names[0]] = places[0]
    return found


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return one == other or (one[1:] == other[1:] and 0 in (one[0], other[0]))


def tied_names(run: Run, layer: LayerSpec, other: LayerSpec) -> dict[str, str]:
    """`paired_matrices` of a run that is tied to a layer of another stack: those of the part that runs."""
    pairs = paired_matrices(dict(layer.matrices), dict(other.matrices))
    return {name: there for name, there in pairs.items() if _runs(run, layer, name)}


def missing_stacks(steps: tuple[Step, ...], spec: Spec) -> Iterator[Finding]:
    """P102 and P103 for layers of other stacks that runs are tied to and that are not there."""
    depths = {stack.name: stack.depth for stack in spec.stacks}
    for run in runs(steps):
        if isinstance(run.tied_to, StackLayer):
            here, depth = f"the {TiedLayer.noun} {run.tied_to}", depths.get(run.tied_to.stack)
            if depth is None:
                yield "P102", run.layer, f"{here} is of no stack of this model, which has {', '.join(depths)}"
            elif run.tied_to.layer >= depth:
                yield "P103", run.layer, f"{here} does not exist; {run.tied_to.stack} layers are 0 to {depth - 1}"


def unfit_ties(plan: Plan, stack: StackSpec, spec: Spec, layers: Layers | None) -> Iterator[Finding]:
    """P127 for a layer that is tied to itself, to one that is tied itself, or to one of other matrices.

    Within a stack matrices are compared one by one, by name and shape, where `layers` tells them; else by their number
    of elements. Across stacks all those of one of the two layers must go together with one of the other's.
    """
    for run in runs(plan.steps(stack.name)):
        if run.tied_to is None:
            continue
        here = f"layer {run.layer} should run with the matrices of layer {run.tie}"
        tie = run.tied_to if isinstance(run.tied_to, StackLayer) else StackLayer(stack.name, run.tied_to)
        if tie.stack == stack.name and tie == run.tied_to:
            yield "P127", run.layer, f"{here}, which is of the same stack; write {run.layer}={tie.layer}"
        elif run.tie == run.layer:
            yield "P127", run.layer, f"{here}, which are its own; write {run.layer}"
        elif any(one.layer == tie.layer and one.tied_to is not None for one in runs(plan.steps(tie.stack))):
            why = f"{here}, which is tied itself; name the layer whose matrices they are"
            yield "P127", run.layer, why
        elif differ := (
            _differ(run, tie.layer, stack, layers) if tie.stack == stack.name else _differ_across(run, tie, stack, spec)
        ):
            yield "P127", run.layer, f"{here}, but {differ}; tie layers of one structure"


def _unnumbered(names: Iterable[str]) -> dict[str, list[str]]:
    """The names without the numbers between their dots, and whose these are."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(".".join(piece for piece in name.split(".") if not piece.isdigit()), []).append(name)
    return found


def _runs(run: Run, layer: LayerSpec, name: str) -> bool:
    """Whether the matrix is of the part that runs."""
    return run.part == "layer" or name.startswith(_inside(layer, run))


def _differ_across(run: Run, tie: StackLayer, stack: StackSpec, spec: Spec) -> str | None:
    """How the matrices of layers of two stacks differ; None where all those of one find their place in the other."""
    layer, other = stack.layers[run.layer], spec.stack(tie.stack).layers[tie.layer]
    pairs = tied_names(run, layer, other)
    mine = {name: shape for name, shape in layer.matrices if name not in pairs and _runs(run, layer, name)}
    theirs = {name: shape for name, shape in other.matrices if name not in pairs.values()}
    if pairs and not (mine and (theirs or run.part != "layer")):
        return None
    places = {bare: names[0] for bare, names in _unnumbered(theirs).items()}
    for bare, names in _unnumbered(mine).items():
        if bare in places:
            shapes = f"{list(mine[names[0]])} in layer {run.layer} and {list(theirs[places[bare]])}"
            return f"{names[0]} is {shapes} in {run.tie}"
    where, here = (run.tie, f"layer {run.layer}") if theirs else (f"layer {run.layer}", run.tie)
    return f"{next(iter(theirs or mine), 'what there is')} of {where} has no place in {here}"


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
        inside = _inside(own, run)
        mine, theirs = ({n: s for n, s in held.items() if n.startswith(inside)} for held in (mine, theirs))
    for name in sorted(mine.keys() | theirs.keys()):
        if name in mine and name in theirs and mine[name] != theirs[name]:
            return f"{name} is {list(mine[name])} in layer {run.layer} and {list(theirs[name])} in layer {tie}"
    return None


def _inside(layer: LayerSpec, run: Run) -> tuple[str, ...]:
    """How the names begin of what the run calls."""
    return tuple(f"{name}." for part in _parts(layer, run) for name in part.modules)


def _parts(layer: LayerSpec, run: Run) -> list[PartSpec]:
    """The parts of the layer that the run calls, as far as they are known apart."""
    by_name = {"attention": layer.attention, "mlp": layer.mlp}
    return [part for name, part in by_name.items() if part is not None and run.part in ("layer", name)]


def _size(layer: LayerSpec, run: Run) -> int:
    """Elements of the matrices that the run reads."""
    if run.part == "layer":
        return layer.params - layer.vectors
    return sum(part.params - part.vectors for part in _parts(layer, run))
