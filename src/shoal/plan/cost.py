"""What a plan costs on its model: parameters by unique storage, FLOPs and KV, for prefill and for decode.

Counted: every matrix multiplication (2 FLOPs per weight and token; experts as often as they are used), attention scores
and their weighting (2 x width FLOPs per query and key, causal), the output head (prefill: the last position only, as
`generate` does it). Not counted: norms, activations, embedding look-ups, softmax; together under one per cent.
What a run takes from another layer (keys, values, an attention map) it does not make: the matrices for it are not
counted, where they make nothing else and are known (`LayerSpec.projections`).
A run that reads a later one goes over the prompt in passes: `prefill_flops` is that of one pass, and an exact prefill
takes as many as are needed until nothing changes, at most one for each token of the prompt. A decoded token takes one.
Encoder and vision stacks run once, over `prompt` positions that all see each other, and not for a decoded token.
Gated layers count as run and exits as not taken: this is the dearest token. Own heads of gated exits are not counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, NamedTuple, assert_never

from shoal.plan.around import around_flops
from shoal.plan.fewer_heads import stored_kv
from shoal.plan.given import Given, given_plan
from shoal.plan.heads import LOGITS, depths_in
from shoal.plan.layer_size import causal_pairs, layer_size, score_width
from shoal.plan.low_rank import INSTEAD, WORDS, replaced_matrices
from shoal.plan.plan import Plan
from shoal.plan.select import paired
from shoal.plan.sources import StackLayer
from shoal.plan.spec import LayerSpec, ProjectionSpec, Spec, StackSpec
from shoal.plan.steps import Exit, Map, Parallel, Run, Step, runs
from shoal.plan.tensors import Shapes, smaller_by, stands_beside, tensors_of, tensors_of_run
from shoal.plan.ties import tied_names


@dataclass(frozen=True, slots=True)
class Shape:
    """The work that is costed: `batch` sequences of `prompt` tokens, then tokens decoded at context `context`."""

    batch: int = 1
    prompt: int = 512
    context: int = 512


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one plan. Elements and FLOPs are exact integers; bytes follow from the dtype the caller names."""

    params: int
    """Unique storage of what the plan reads, as a planned checkpoint holds it: a repeated layer and the matrices of
    tied ones count once, and what new tensors stand in for counts no more where no other run reads it."""
    written_params: int
    """Parameters of a stock checkpoint of this plan: a repeated layer counts as often as it runs, a half that is left
    alone as a whole one, and an attention with the mlp behind it as one where they are a layer together."""
    layer_runs: int
    """Layers executed per token; an attention or mlp alone counts as a half run."""
    half_runs: int
    prefill_flops: int
    decode_flops: int
    """Per decoded token and per sequence in the batch, times the batch."""
    kv_per_token: int
    """KV elements stored for one token of one sequence while no window is full."""
    kv_elements: int
    """KV elements held for the whole batch at `context` tokens, recurrent states included."""
    shape: Shape = field(default_factory=Shape)
    assumed: tuple[str, ...] = ()
    """The ids of new weights that were counted at their largest because the shapes of their tensors were not given."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `assumed` where there is any."""
        return {name: value for name, value in asdict(self).items() if name != "assumed" or value}


def cost(plan: Given, spec: Spec, shape: Shape | None = None, weights: Shapes | None = None) -> Cost:
    """What `plan`, a Plan, depth notation or the place of a plan.json, costs on `spec` for the work `shape`. It must
    have passed `check`.

    `weights`: the shapes of the new tensors that it names (`shapes_of`). With them a low-rank map costs what it is, and
    a layer of which one tensor is new shares the others with the base. Of an id without any a map is counted as a full
    one with a bias, and a layer as all new; `Cost.assumed` names it.
    """
    plan = plan if isinstance(plan, Plan) else given_plan(plan, Plan.identity(spec))
    shape = shape or Shape()
    totals = [_stack_cost(plan, stack, shape, weights or {}, spec) for stack in spec.stacks]
    storages = {name: count for total in totals for name, count in total.storages.items()}
    shared = sum({name: count for total in totals for name, count in total.shared.items()}.values())
    readings = [one for total in totals for one in total.readings]
    return Cost(
        params=spec.other_params + sum(storages.values()) + shared - _unread(readings),
        written_params=spec.other_params + sum(total.written for total in totals) + shared,
        layer_runs=sum(total.layer_runs for total in totals),
        half_runs=sum(total.half_runs for total in totals),
        prefill_flops=shape.batch * (sum(total.prefill for total in totals) + spec.head_flops),
        decode_flops=shape.batch * (sum(total.decode for total in totals) + spec.head_flops),
        kv_per_token=sum(total.kv_per_token for total in totals),
        kv_elements=shape.batch * sum(total.kv_elements for total in totals),
        shape=shape,
        assumed=tuple(sorted({name for total in totals for name in total.assumed})),
    )


class MapSize(NamedTuple):
    """What one map holds and does."""

    params: int
    flops: int
    """Of its matrix multiplications, for one token."""


def map_size(step: Map, hidden: int, weights: Shapes | None = None) -> MapSize:
    """The size of a map on states of `hidden` elements, by the shapes `weights` of its tensors; of one whose shapes are
    not among them that of a full map with a bias."""
    return _map_size(_own(step.weights, weights or {}), hidden)


def _map_size(own: dict[str, int], hidden: int) -> MapSize:
    if not own:
        return MapSize(hidden * (hidden + 1), 2 * hidden**2)
    return MapSize(sum(own.values()), 2 * sum(own.get(name, 0) for name in ("weight", "gate", "down", "up", "keys")))


class _Reading(NamedTuple):
    """What one run reads of the matrices, or of the vectors, of one layer."""

    layer: str
    matrices: bool
    left_out: tuple[str, ...]
    """How the names of tensors begin that it does not read, as their part does not run."""
    replaced: dict[str, int]
    """By name the elements of those for which it has tensors of its own."""


@dataclass(slots=True)
class _Total:
    storages: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    written: int = 0
    layer_runs: int = 0
    half_runs: int = 0
    prefill: int = 0
    decode: int = 0
    kv_per_token: int = 0
    kv_elements: int = 0
    assumed: set[str] = field(default_factory=set)
    readings: list[_Reading] = field(default_factory=list)


def _stack_cost(plan: Plan, stack: StackSpec, shape: Shape, weights: Shapes, spec: Spec) -> _Total:
    total = _Total()
    for step in plan.steps(stack.name):
        match step:
            case Map():
                _add_map(total, step, stack, shape, weights)
            case Run() | Parallel():
                for run in runs((step,)):
                    _add_run(total, run, stack, shape, weights)
                    if isinstance(run.tied_to, StackLayer):
                        _add_across(total, run, run.tied_to, stack, spec, weights)
            case Exit():
                _add_head(total, step, spec, weights)
            case _:
                assert_never(step)
    total.written -= _joined(plan.steps(stack.name), stack)
    if not stack.decodes:
        total.decode = 0
    return total


def _add_map(total: _Total, step: Map, stack: StackSpec, shape: Shape, weights: Shapes) -> None:
    own = _own(step.weights, weights)
    size = _map_size(own, stack.hidden)
    if not own:
        total.assumed.add(step.weights)
    total.storages[f":{step.weights}"] = size.params
    total.written += size.params
    total.prefill += size.flops * shape.prompt
    total.decode += size.flops


def _add_head(total: _Total, step: Exit, spec: Spec, weights: Shapes) -> None:
    """The tensors of the head at the end of the plan, and the products with the head that it needs beside the last."""
    own = _own(step.head, weights)
    if step.gate is None and step.head != "base":
        total.storages[f":{step.head}"] = sum(own.values())
        more = max(0, len(depths_in(step.head, LOGITS, weights)) - 1)
        total.prefill += more * spec.head_flops
        total.decode += more * spec.head_flops
        total.assumed |= set() if own else {step.head}


def _joined(steps: tuple[Step, ...], stack: StackSpec) -> int:
    """By how much a stock checkpoint is smaller as an attention run and the mlp run behind it are one layer."""
    pairs = ((stack.layers[run.layer], stack.layers[mlp.layer]) for run, mlp in paired(steps) if mlp is not None)
    return sum(
        other.params for layer, other in pairs if layer.mlp_reads_attention and _mlp_size(layer) == _mlp_size(other)
    )


def _mlp_size(layer: LayerSpec) -> int | None:
    return None if layer.mlp is None else layer.mlp.params


def _own(weights_id: str, weights: Shapes) -> dict[str, int]:
    """Elements of the tensors of one id, by their names within it."""
    return {name: prod(shape) for name, shape in tensors_of(weights_id, weights).items()}


def _add_run(total: _Total, run: Run, stack: StackSpec, shape: Shape, weights: Shapes) -> None:
    layer = stack.layers[run.layer]
    params, flops = layer_size(layer, run)
    # the name of new weights is one for all stacks, and may look like a layer's number
    own = {weights_id: _own(weights_id, weights) for weights_id in run.ids}
    unknown = [weights_id for weights_id, sizes in own.items() if not sizes]
    storage = f":{unknown[-1]}" if unknown else f"{stack.name}.{layer.index}"
    total.storages |= {f":{weights_id}": sum(sizes.values()) for weights_id, sizes in own.items() if sizes}
    total.assumed |= set(unknown)
    tied = storage if run.tied_layer is None else f"{stack.name}.{run.tied_layer}"
    new = tensors_of_run(run, weights)
    for piece, (matrices, vectors) in params.items():
        total.storages[f"{tied}.{piece}"] = matrices
        total.storages[f"{storage}.{piece}.vectors"] = vectors
    total.readings += _readings(run, layer, tied, storage, new)
    less = smaller_by(layer, run, new)
    total.written += layer.params - sum(less.values())  # a stock checkpoint holds whole layers
    total.shared |= dict(layer.shared)
    total.layer_runs += run.part == "layer"
    total.half_runs += run.part != "layer"
    flops += _factor_flops(new) + around_flops(new)
    flops -= sum(one.flops for one in _left_out(layer, run))
    flops -= sum(2 * size for name, size in less.items() if len(new[name]) > 1)
    total.prefill += flops * shape.prompt
    total.decode += flops
    if run.part != "mlp":
        pairs = causal_pairs(shape.prompt, layer.kv.window) if stack.decodes else shape.prompt**2
        width = score_width(layer, run)
        total.prefill += 2 * width * pairs
        total.decode += 2 * width * min(shape.context, layer.kv.window or shape.context)
    stored = stored_kv(layer, run, new)
    total.kv_per_token += stored.per_token
    total.kv_elements += stored.elements(shape.context)


def _add_across(total: _Total, run: Run, tie: StackLayer, stack: StackSpec, spec: Spec, weights: Shapes) -> None:
    """A run with the matrices of a layer of another stack: what it reads there, and so not of its own layer."""
    layer, other = stack.layers[run.layer], spec.stack(tie.stack).layers[tie.layer]
    for piece, (matrices, _) in layer_size(other, Run(tie.layer))[0].items():
        total.storages[f"{tie.stack}.{tie.layer}.{piece}"] = matrices
    own = total.readings[-2]
    assert own.matrices
    taken = {name: there for name, there in tied_names(run, layer, other).items() if name not in own.replaced}
    shapes = dict(layer.matrices)
    total.readings[-2] = own._replace(replaced=own.replaced | {name: prod(shapes[name]) for name in taken})
    there = {name: prod(shape) for name, shape in other.matrices}
    rest = {"": other.params - other.vectors - sum(there.values())}
    unread = {name: size for name, size in (there | rest).items() if name not in taken.values()}
    total.readings.append(_Reading(f"{tie.stack}.{tie.layer}", True, (), unread))


def _left_out(layer: LayerSpec, run: Run) -> tuple[ProjectionSpec, ...]:
    """The projections that the run does not call."""
    return layer.unused(run.unmade) if run.part != "mlp" else ()


def _readings(run: Run, layer: LayerSpec, tied: str, storage: str, own: Shapes) -> list[_Reading]:
    left_out, base = layer.left_out(run.part), layer.sizes
    gone = {n: base.get(n, prod(shape)) for n, shape in own.items() if not stands_beside(n, shape)}
    for name in replaced_matrices(own):
        left, right = (own[f"{name.removesuffix('.weight')}.{word}"] for word in INSTEAD)
        gone[name] = left[0] * right[-1]
    flat = {name for name, shape in own.items() if len(shape) < 2}
    for one in _left_out(layer, run):
        gone |= {name: prod(shape) for name, shape in one.tensors}
        flat |= {name for name, shape in one.tensors if len(shape) < 2}
    return [
        _Reading(where, matrices, left_out, {n: size for n, size in gone.items() if (n not in flat) == matrices})
        for matrices, where in ((True, tied), (False, storage))
    ]


def _factor_flops(own: Shapes) -> int:
    """By how much low-rank factors change the FLOPs of one token: two matrices more, and one less where they stand in
    its place."""
    more = sum(2 * prod(shape) for name, shape in own.items() if name.rpartition(".")[2] in WORDS)
    instead = (name.removesuffix(".weight") for name in replaced_matrices(own))
    return more - sum(2 * own[f"{module}.left"][0] * own[f"{module}.right"][-1] for module in instead)


def _unread(readings: list[_Reading]) -> int:
    """Elements of the base's tensors for which every run that would read them has tensors of its own."""
    found = 0
    for layer, matrices in {(one.layer, one.matrices) for one in readings}:
        mine = [one for one in readings if (one.layer, one.matrices) == (layer, matrices)]
        sizes = {name: size for one in mine for name, size in one.replaced.items()}
        for name, size in sizes.items():
            found += size if all(name in one.replaced for one in mine if not name.startswith(one.left_out)) else 0
    return found
