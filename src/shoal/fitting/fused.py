"""Distilling removed layers into the layers beside them, by low-rank updates that are folded into dense matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from shoal.errors import UsageError
from shoal.fitting.holes import Hole, Pair
from shoal.fitting.result import Fit, Job, Transformed
from shoal.fitting.train import frozen, train
from shoal.models.opened import open_model
from shoal.plan import Run, Step
from shoal.plan.select import run_of

Tensors = dict[str, torch.Tensor]
Places = Callable[[Hole, int, int], range]
"""(hole, the first step that may be changed, the step behind the last) -> the steps that take the hole's layers in."""


@dataclass(frozen=True, slots=True)
class Fusing:
    """How groups are trained."""

    rank: int
    epochs: int
    rate: float


def beside(neighbours: int) -> Places:
    """The `neighbours` steps before the hole and as many behind it."""
    return lambda hole, low, high: range(max(low, hole.position - neighbours), min(high, hole.position + neighbours))


def around(group: int) -> Places:
    """The `group` - 1 steps nearest to the hole, one more behind it than before it where these are odd in number, and
    more on one side where the other has too few."""

    def found(hole: Hole, low: int, high: int) -> range:
        count = min(group - 1, high - low)
        start = min(max(low, hole.position - (group - 1) // 2), high - count)
        return range(start, start + count)

    return found


def fused(
    job: Job, holes: Sequence[Hole], removed: Callable[[Hole], Sequence[int]], places: Places, how: Fusing, skip: int
) -> Transformed:
    """`job.plan` with the layers `removed(hole)` of each hole distilled into the steps `places(hole, ...)`.

    Layers that were fused before (their tensors are in `job.weights`) are taken as they are now. Raises U556 and U557
    as the transform `fuse-group` does.
    """
    pair = Pair(job, skip_first=skip)
    steps: list[Step] = list(pair.steps)
    weights, fits = dict(job.weights), list[Fit]()
    for number, hole in enumerate(holes):
        high = holes[number + 1].position if number + 1 < len(holes) else len(steps)
        chosen = places(hole, pair.cursor, high)
        group = [_whole(steps[place], hole) for place in chosen]
        if not group or hole.part != "layer":
            raise UsageError(f"no layer beside {hole} can take it in; keep a neighbour", code="U557")
        pair.prune_to(chosen.start)
        pair.dense_to(group[-1].layer + 1 if chosen.stop > hole.position else hole.last + 1)
        with frozen(pair.inputs.model):
            tensors, fit = _fused(pair, group, hole, removed(hole), how)
        fits.append(fit)
        weights |= tensors
        for place, run in zip(chosen, group, strict=True):
            steps[place] = replace(run, weights=_id(run)) if tensors else run
            pair.pruned.advance(steps[place], weights)
            pair.skip_step()
        job.tell(number + 1, len(holes), "fuse groups")
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), weights, tuple(fits))


def _whole(step: Step, hole: Hole) -> Run:
    run = run_of(step)
    if run is not None and run.part == "layer" and run.weights in (None, _id(run)):
        return run
    raise UsageError(f"a step beside {hole} is no whole layer with its own weights; keep one there", code="U557")


def _id(run: Run) -> str:
    return f"fuse-group-{run.layer}"


def _now(pair: Pair, layer: int) -> Mapping[str, torch.Tensor]:
    """The parameters of a layer as it is by now."""
    own = open_model(pair.job.model).stack(pair.job.stack).layer(layer).named_parameters()
    weights = pair.job.weights
    return {name: weights.get(f"{_id(Run(layer))}.{name}", tensor.detach()) for name, tensor in own}


class _Update:
    """The learnable part of one matrix."""

    def __init__(self, old: torch.Tensor, removed: list[torch.Tensor], rank: int, generator: torch.Generator) -> None:
        rows, columns = old.shape
        rank = min(rank, rows, columns)
        self.old, self.removed = old, removed
        count = len(removed) + 1
        self.left = torch.zeros(count, rows, rank, dtype=torch.float32, device=old.device, requires_grad=True)
        drawn = torch.randn(count, rank, columns, generator=generator) / rank**0.5
        self.right = drawn.to(old.device).requires_grad_()

    def matrix(self) -> torch.Tensor:
        products = self.left @ self.right
        mixed = sum((c * w.float() for c, w in zip(products[1:], self.removed, strict=True)), products[0])
        # the first product is small beside W, whose entries are about 1 / sqrt(columns)
        return (self.old.float() + mixed).to(self.old.dtype)


def _fused(pair: Pair, group: list[Run], hole: Hole, layers: Sequence[int], how: Fusing) -> tuple[Tensors, Fit]:
    """The dense matrices of the group after training, and the error of the group's output before and after."""
    removed = [_now(pair, layer) for layer in layers]
    generator = torch.Generator().manual_seed(pair.job.seed)
    updates: dict[str, _Update] = {}
    for run in group:
        for name, tensor in _now(pair, run.layer).items():
            if tensor.dim() != 2:
                continue
            if any(name not in one or one[name].shape != tensor.shape for one in removed):
                raise UsageError(
                    f"layer {run.layer} and the removed {hole} have different matrices; fuse layers of one kind",
                    code="U556",
                )
            updates[f"{_id(run)}.{name}"] = _Update(tensor, [one[name] for one in removed], how.rank, generator)
    done = train(
        [leaf for update in updates.values() for leaf in (update.left, update.right)],
        lambda number: _loss(pair, group, updates, number),
        [n for n in range(len(pair.kept)) if n not in pair.held],
        sorted(pair.held),
        epochs=how.epochs,
        rate=how.rate,
        seed=pair.job.seed,
    )
    note = f"{how.epochs} epochs, relative errors" if how.epochs else "not trained"
    fit = Fit(str(hole), done.before, done.after, done.held_before, done.held_after, note)
    if not how.epochs:
        return {}, fit
    with torch.no_grad():
        return {name: update.matrix().contiguous() for name, update in updates.items()}, fit


def _loss(pair: Pair, group: list[Run], updates: dict[str, _Update], number: int) -> torch.Tensor:
    """Mean squared error relative to each token's length, per element."""
    matrices = {name: update.matrix() for name, update in updates.items()}
    stream = pair.inputs.stream()
    stream.states = list(pair.pruned.states)
    for run in group:
        stream.states[number] = stream.run(number, replace(run, weights=_id(run)), matrices)
    keep = pair.kept[number]
    out, target = stream.states[number][keep].float(), pair.dense.states[number][keep].float()
    return ((out - target).square().sum(-1) / target.square().sum(-1)).mean() / out.shape[-1]
