"""Runs whose own tensors make fewer heads of keys and values than their layer does (MLKV within an owner).

The matrix of a run's keys, and that of its values, may have the rows of fewer heads, as many for both, where their
number divides that of the layer. So many are stored, and each serves as many of the layer's as it stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from shoal.plan.sources import STORED
from shoal.plan.spec import KVSpec, LayerSpec
from shoal.plan.steps import Run

Shapes = Mapping[str, tuple[int, ...]]


def heads_made(layer: LayerSpec, own: Shapes) -> int:
    """How many heads of keys and values a run of `layer` makes with the tensors `own`, by their names in it."""
    found = [shape[0] // size for name, shape, size in _heads(layer, own)]
    return min(found, default=layer.kv.heads)


def stored_kv(layer: LayerSpec, run: Run, own: Shapes) -> KVSpec:
    """What a run keeps between tokens: all that its layer does, its keys or its values alone, in as many heads as its
    own tensors make, or nothing."""
    kv, missing = layer.kv, STORED - run.stores
    if missing == STORED:
        return KVSpec("none")
    keys, values = (0 if one in missing else size for one, size in (("keys", kv.key_dim), ("values", kv.value_dim)))
    return replace(kv, key_dim=keys, value_dim=values, heads=heads_made(layer, own))


def narrower(layer: LayerSpec, own: Shapes) -> set[str]:
    """The names of those of `own` that have the rows of fewer heads, rightly."""
    return {
        name
        for name, shape, size in _heads(layer, own)
        if layer.kv.any_heads
        and shape[0] % size == 0
        and shape[0] > 0
        and layer.kv.heads % (shape[0] // size) == 0
        and shape[1:] == _base(layer)[name][1:]
    }


def unlike_heads(run: Run, layer: LayerSpec, own: Shapes) -> Iterator[tuple[str, int, str]]:
    """P129 where keys and values that the run makes have not the same number of heads."""
    fewer = narrower(layer, own)
    made = {
        half: {own[name][0] // size if name in fewer else layer.kv.heads for name, size in names.items()}
        for half, names in _names(layer).items()
        if half in run.stores
    }
    if fewer and len(set().union(*made.values())) > 1:
        words = " and ".join(f"{'/'.join(map(str, sorted(counts)))} of {half}" for half, counts in made.items())
        yield "P129", run.layer, f"the tensors of layer {run.layer} make {words} heads; give as many for both"


def _base(layer: LayerSpec) -> dict[str, tuple[int, ...]]:
    return {name: shape for one in layer.projections for name, shape in one.tensors}


def _names(layer: LayerSpec) -> dict[str, dict[str, int]]:
    """By keys and values the tensors that make them alone, each with the size of a head."""
    sizes = {"keys": layer.kv.key_dim, "values": layer.kv.value_dim}
    return {
        half: {name: size for one in layer.projections if one.makes == {half} for name, _ in one.tensors}
        for half, size in sizes.items()
    }


def _heads(layer: LayerSpec, own: Shapes) -> list[tuple[str, tuple[int, ...], int]]:
    """(name, shape, size of a head) of those of `own` that make keys or values in another number of rows."""
    base = _base(layer)
    return [
        (name, own[name], size)
        for names in _names(layer).values()
        for name, size in names.items()
        if name in own and size and own[name] and own[name][0] < base[name][0]
    ]
