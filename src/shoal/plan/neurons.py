"""Runs whose own tensors make another number of neurons in the mlp than their layer does.

All matrices that make neurons and the one that reads them must then be among the tensors of the run, with their biases,
for as many neurons each. What the layer has between them works on each neuron alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shoal.plan.around import AFFINE
from shoal.plan.low_rank import WORDS
from shoal.plan.spec import LayerSpec, NeuronTensor
from shoal.plan.steps import Run

Shapes = Mapping[str, tuple[int, ...]]


def neurons_made(layer: LayerSpec, own: Shapes) -> int:
    """How many neurons the mlp of a run of `layer` has with the tensors `own`, by their names in it; 0 where nobody
    knows."""
    if layer.neurons is None:
        return 0
    return _count(layer, layer.neurons.reads, own)


def resized(layer: LayerSpec, own: Shapes) -> set[str]:
    """The names of those of `own` that are for another number of neurons, rightly by themselves."""
    if layer.neurons is None:
        return set()
    return {one.name for one in layer.neurons.tensors if _count(layer, one, own) not in (0, layer.neurons.count)}


def unlike_neurons(run: Run, layer: LayerSpec, own: Shapes) -> Iterator[tuple[str, int, str]]:
    """P129 where the tensors that the run has of its mlp are for different numbers of neurons, or have factors, scales
    or shifts beside another number than the layer's."""
    other = resized(layer, own)
    if layer.neurons is None or not other or run.part == "attention":
        return
    counts = {one.name: _count(layer, one, own) or layer.neurons.count for one in layer.neurons.tensors}
    first = min(other)
    if unlike := next((name for name, count in counts.items() if count != counts[first]), None):
        words = f"{counts[first]} neurons in {first} and {counts[unlike]} in {unlike}"
        yield "P129", run.layer, f"the tensors of layer {run.layer} make {words}; give all of them for as many"
    modules = {name.rpartition(".")[0] for name in counts}
    for name in own:
        module, _, word = name.rpartition(".")
        if module in modules and (word in WORDS or (word in AFFINE and own[name] != (1,))):
            words = f"the tensors of layer {run.layer} make {counts[first]} neurons, and {name} stands beside"
            yield "P129", run.layer, f"{words} a matrix of {layer.neurons.count}; multiply it into the matrix"
            return


def _count(layer: LayerSpec, one: NeuronTensor, own: Shapes) -> int:
    """For how many neurons a tensor of `own` is, that of the layer where `own` has none; 0 for a shape that fits no
    number."""
    assert layer.neurons is not None
    shape = own.get(one.name, one.shape)
    each = layer.neurons.places(one, 1)
    if (
        len(shape) != len(one.shape)
        or shape[one.dim] % each
        or any(found != held for at, (found, held) in enumerate(zip(shape, one.shape, strict=True)) if at != one.dim)
    ):
        return 0
    return shape[one.dim] // each
