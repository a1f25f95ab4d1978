"""FuseGPT-style fusion: the removed layer's matrices flow into its neighbours by a local distillation."""

from __future__ import annotations

from dataclasses import replace

import torch

from shoal.errors import UsageError
from shoal.examples import TransformExamples
from shoal.fitting.holes import Hole, Pair, find_holes
from shoal.fitting.result import Fit, Job, Transformed
from shoal.fitting.train import frozen, train
from shoal.models.opened import open_model
from shoal.plan import Run, Step
from shoal.plan.select import whole_run

Tensors = dict[str, torch.Tensor]

EXAMPLES = TransformExamples(role="trained", quick={"epochs": 1}, refused=(((2,), {"neighbours": 0}, "U557"),))


def fuse_group(
    job: Job, *, neighbours: int = 1, rank: int = 8, epochs: int = 4, rate: float = 1e-3, skip_first: int = 1
) -> Transformed:
    """Distil each removed span into the `neighbours` layers that run before it and as many behind it.

    In each of these layers every matrix becomes W + B A + sum_j (C_j D_j) * W_j: W frozen, W_j the matrix of the j-th
    removed layer, frozen, times a coefficient for each element of the given rank (* elementwise), B A an update of
    that rank. B and C start at zero, so that training starts from dropping. Adam on mean |f(x) - y|^2 / |y|^2, x the
    states of the pruned model before the group, y the dense ones behind it, without the first `skip_first` tokens. A
    quarter of the sequences is held back and says after which epoch it is best; the start counts as one.
    The result is folded into dense matrices of the same shapes: no cost at run time, a stock checkpoint holds it.
    `epochs` 0 is dropping, bit for bit. Raises U556 when a neighbour has other matrices than a removed layer, U557 when
    the span has no neighbour that runs whole.

    Source: Pei et al. 2024 (FuseGPT, arXiv 2411.14507).

    How we differ: squared error relative to each token's length instead of a KL divergence (the released code's is over
    the batch axis), one rate; choose what to remove by any method.
    """
    holes = find_holes(job.plan, "fuse-group", job.stack)
    pair = Pair(job, skip_first=skip_first)
    steps: list[Step] = list(pair.steps)
    weights = dict(job.weights)
    fits: list[Fit] = []
    for number, hole in enumerate(holes):
        start = max(pair.cursor, hole.position - neighbours)
        places = range(start, min(len(steps), hole.position + neighbours))
        later = [other.position for other in holes[number + 1 :] if other.position < places.stop]
        places = range(start, min([places.stop, *later]))
        group = [_whole(steps[place], hole) for place in places]
        if not group or hole.part != "layer":
            raise UsageError(f"no layer beside {hole} can take it in; keep a neighbour", code="U557")
        pair.prune_to(start)
        behind = group[-1].layer + 1 if places.stop > hole.position else hole.last + 1
        pair.dense_to(behind)
        with frozen(pair.inputs.model):
            tensors, fit = _fused(pair, group, hole, rank=rank, epochs=epochs, rate=rate)
        fits.append(fit)
        weights |= tensors
        for place, run in zip(places, group, strict=True):
            steps[place] = replace(run, weights=_id(run)) if tensors else run
            pair.pruned.advance(steps[place], weights)
            pair.skip_step()
        job.tell(number + 1, len(holes), "fuse groups")
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), weights, tuple(fits))


def _whole(step: Step, hole: Hole) -> Run:
    if run := whole_run(step):
        return run
    raise UsageError(f"a step beside {hole} is no whole layer with its own weights; keep one there", code="U557")


def _id(run: Run) -> str:
    return f"fuse-group-{run.layer}"


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


def _fused(pair: Pair, group: list[Run], hole: Hole, *, rank: int, epochs: int, rate: float) -> tuple[Tensors, Fit]:
    """The dense matrices of the group after training, and the error of the group's output before and after."""
    stack = open_model(pair.job.model).stack(pair.job.stack)
    removed = [dict(stack.layer(i).named_parameters()) for i in range(hole.first, hole.last + 1)]
    generator = torch.Generator().manual_seed(pair.job.seed)
    updates: dict[str, _Update] = {}
    for run in group:
        for name, tensor in stack.layer(run.layer).named_parameters():
            if tensor.dim() != 2:
                continue
            if any(name not in one or one[name].shape != tensor.shape for one in removed):
                raise UsageError(
                    f"layer {run.layer} and the removed {hole} have different matrices; fuse layers of one kind",
                    code="U556",
                )
            old, others = tensor.detach(), [one[name].detach() for one in removed]
            updates[f"{_id(run)}.{name}"] = _Update(old, others, rank, generator)
    done = train(
        [leaf for update in updates.values() for leaf in (update.left, update.right)],
        lambda number: _loss(pair, group, updates, number),
        [n for n in range(len(pair.kept)) if n not in pair.held],
        sorted(pair.held),
        epochs=epochs,
        rate=rate,
        seed=pair.job.seed,
    )
    note = f"{epochs} epochs, relative errors" if epochs else "not trained"
    fit = Fit(str(hole), done.before, done.after, done.held_before, done.held_after, note)
    if not epochs:
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
