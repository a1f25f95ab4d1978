"""How many bytes one decode step moves: the weights that its runs read, and keys and values at its context.

Decoding one sequence reads every weight for one product with a single row, so its time is mostly that of the memory,
and bytes say more about it than FLOPs do. Counted: the matrices of every run and map (experts as often as they are
used, at most all of them for a batch), the output head, and the keys, values and states that runs read. Not counted:
norms, biases, activations, what is written, and the rows of the embedding; together under one per cent.

Assumed: what is read comes from memory once in each run, also where a loop or a tie reads the same weights again,
unless everything that is read between two readings fits into `cache_bytes` of the processor's cache together with the
thing itself (least recently used, whole things only); then it comes from there. Keys and values stay in the cache by
the same rule. The default, 0, is a cache that holds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, NamedTuple

from shoal.errors import UsageError
from shoal.plan.cost import Shape, map_size
from shoal.plan.fewer_heads import stored_kv
from shoal.plan.given import Given, given_plan
from shoal.plan.plan import Plan
from shoal.plan.sources import KV
from shoal.plan.spec import KVSpec, LayerSpec, Spec, StackSpec
from shoal.plan.steps import Map, Run, Step, key_source, map_source, runs, value_source, writes_kv
from shoal.plan.tensors import Shapes, tensors_of, tensors_of_run

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
"""Bytes of one element, by torch's name of the dtype."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes that one decode step of a whole batch reads."""

    weights: int
    """From memory."""
    kv: int
    """From memory: keys, values and recurrent states at the context."""
    near: int
    """Weights, keys and values that are still in the processor's cache from a run before."""
    parts: int
    """Attentions and mlps that run, maps included; a layer without parts counts as one."""
    dtype: str
    kv_dtype: str
    cache_bytes: int

    @property
    def total(self) -> int:
        """From memory, all together."""
        return self.weights + self.kv

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with `total`."""
        return asdict(self) | {"total": self.total}


class _Read(NamedTuple):
    name: str
    bytes: int
    is_kv: bool = False


def moved(
    plan: Given,
    spec: Spec,
    shape: Shape | None = None,
    *,
    dtype: str = "float32",
    kv_dtype: str | None = None,
    cache_bytes: int = 0,
    weights: Shapes | None = None,
) -> Moved:
    """The bytes that a decode step of `plan` reads on `spec` at `shape.context` tokens for `shape.batch` sequences.

    `plan`: a Plan, depth notation or the place of a plan.json; it must have passed `check`. `dtype`: of the weights,
    and of keys and values unless `kv_dtype` is given. `cache_bytes`: of the processor's last cache, see above.
    `weights`: the shapes of the new tensors that the plan names (`shapes_of`); a replaced layer of which nothing is
    known reads as many as its base layer. Raises U502 for a dtype of unknown size.
    """
    plan = plan if isinstance(plan, Plan) else given_plan(plan, Plan.identity(spec))
    shape, kv_dtype = shape or Shape(), kv_dtype or dtype
    for name in (dtype, kv_dtype):
        if name not in BYTES:
            raise UsageError(f"moved: dtype={name} is not one of {', '.join(BYTES)}", code="U502")
    reads, parts = list[_Read](), 0
    for stack in (one for one in spec.stacks if one.decodes):
        steps = plan.steps(stack.name)
        found = _Reads(stack, shape, BYTES[dtype], BYTES[kv_dtype], weights or {})
        reads += [read for step in steps for read in found.of(step)]
        parts += sum(
            1 if isinstance(s, Map) else sum(_parts(stack.layers[r.layer], r) for r in runs((s,))) for s in steps
        )
    reads.append(_Read("head", spec.head_flops // 2 * BYTES[dtype]))
    far, near = _from_memory(reads, cache_bytes)
    kv = sum(read.bytes for read in far if read.is_kv)
    return Moved(sum(read.bytes for read in far) - kv, kv, near, parts, dtype, kv_dtype, cache_bytes)


def _parts(layer: LayerSpec, run: Run) -> int:
    return 2 if run.part == "layer" and layer.attention is not None and layer.mlp is not None else 1


class _Reads:
    """What the steps of one stack read, one after the other."""

    def __init__(self, stack: StackSpec, shape: Shape, size: int, kv_size: int, weights: Shapes) -> None:
        self.stack, self.shape, self.size, self.kv_size, self.weights = stack, shape, size, kv_size, weights
        self._slots: dict[int, int] = {}
        self._kv_of: dict[int, KVSpec] = {}
        """By layer what its latest run that stores something keeps, keys and values both."""

    def of(self, step: Step) -> Iterator[_Read]:
        if isinstance(step, Map):
            flops = map_size(step, self.stack.hidden, self.weights).flops
            yield _Read(f":{step.weights}", flops // 2 * self.size)
        for run in runs((step,)):
            yield from self._matrices(run)
            if run.part != "mlp":
                yield from self._kv(run)

    def _matrices(self, run: Run) -> Iterator[_Read]:
        layer = self.stack.layers[run.layer]
        own = {weights_id: tensors_of(weights_id, self.weights) for weights_id in run.ids}
        base, new = layer.sizes, 0
        for weights_id, shapes in own.items():
            matrices = {name: prod(shape) for name, shape in shapes.items() if len(shape) > 1}
            yield _Read(f":{weights_id}", sum(matrices.values()) * self.size)
            new += sum(base.get(name, size) for name, size in matrices.items())
        unknown = [weights_id for weights_id, shapes in own.items() if not shapes]
        home = f":{unknown[-1]}" if unknown else f"{self.stack.name}.{layer.index}"
        gone = sum(prod(shape) for one in layer.unused(run.unmade) for _, shape in one.tensors if len(shape) > 1)
        for name, flops, params in _pieces(layer, run):
            elements = min(params, self.shape.batch * flops // 2) - (gone if name == "attention" else 0)
            left = max(0, elements - new)  # new tensors stand in the place of as many of the layer's
            new -= elements - left
            yield _Read(f"{home}.{name}", left * self.size)

    def _kv(self, run: Run) -> Iterator[_Read]:
        if writes_kv(run):
            self._slots[run.layer] = self._slots.get(run.layer, 0) + 1
            whole, own = replace(run, kv=KV()), tensors_of_run(run, self.weights)
            self._kv_of[run.layer] = stored_kv(self.stack.layers[run.layer], whole, own)
        sources = {"keys": key_source(run), "values": value_source(run)}
        if map_source(run) is not None:  # the map is there, and nobody asks for keys
            del sources["keys"]
        if len(sources) == 2 and len(set(sources.values())) == 1:
            sources = {"": sources["keys"]}
        for half, source in sources.items():
            layer = self.stack.layers[run.layer if source is None else source]
            if layer.kv.kind == "shared" and layer.needs:
                layer = self.stack.layers[layer.needs[0]]
            kv = self._kv_of.get(layer.index, layer.kv)
            elements = kv.elements(self.shape.context)
            if half:
                dims = {"keys": kv.key_dim, "values": kv.value_dim}
                elements = elements * dims[half] // max(1, sum(dims.values()))
            # what a later run stores is in its first row already
            name = f"{self.stack.name}.kv.{layer.index}.{self._slots.get(layer.index, 1)}.{half}"
            yield _Read(name, self.shape.batch * elements * self.kv_size, is_kv=True)


def _pieces(layer: LayerSpec, run: Run) -> list[tuple[str, int, int]]:
    """(name, FLOPs for one token, parameters) of what a run multiplies with."""
    parts = {name: part for name, part in (("attention", layer.attention), ("mlp", layer.mlp)) if part is not None}
    found = [(name, part.flops, part.params) for name, part in parts.items() if run.part in ("layer", name)]
    rest = layer.flops - sum(part.flops for part in parts.values())
    return [*found, ("rest", rest, max(rest // 2, layer.params - sum(part.params for part in parts.values())))]


def _from_memory(reads: list[_Read], cache_bytes: int) -> tuple[list[_Read], int]:
    """Which of `reads`, step after step, come from memory, and the bytes of the others."""
    reads = [read for read in reads if read.bytes]
    far, near = list[_Read](), 0
    for at, read in enumerate(reads):
        since: dict[str, int] = {}
        for other in reversed((reads + reads)[: at + len(reads)]):  # back to the same thing, into the step before
            since[other.name] = other.bytes
            if other.name == read.name:
                break
        if sum(since.values()) <= cache_bytes:
            near += read.bytes
        else:
            far.append(read)
    return far, near
