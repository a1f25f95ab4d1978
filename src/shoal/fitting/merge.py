"""Merging removed layers into the layer before them: what all such rules share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shoal.errors import UsageError
from shoal.fitting.holes import Hole, find_holes
from shoal.fitting.result import Job, Transformed
from shoal.models.stacks import find_stack
from shoal.plan import Run, Step

Rule = Callable[[str, Sequence[torch.Tensor], Hole], torch.Tensor]
"""(name, the tensor of the kept layer and then of each removed one in float32, hole) -> the merged tensor."""


def merged(job: Job, name: str, rule: Rule, *, norms: bool = False) -> Transformed:
    """Give the layer before each removed span the tensors that `rule` makes of its own and the removed layers'.

    `norms`: vectors (norm gains, biases) too, else matrices only. Raises U553 when the plan removes nothing, U556 when
    the layers have other tensors or shapes than the one before them, U557 when no whole layer runs before a span.
    """
    stack = find_stack(job.model, job.stack)
    steps: list[Step] = list(job.plan.steps(job.stack))
    weights = dict(job.weights)
    for hole in find_holes(job.plan, name, job.stack):
        run = steps[hole.position - 1] if hole.position else None
        if hole.part != "layer" or not isinstance(run, Run) or run.part != "layer" or run.weights is not None:
            raise UsageError(
                f"{name} merges {hole} into the layer before it, and no whole layer with its own weights runs there; "
                "keep one",
                code="U557",
            )
        own = dict(stack.layer(run.layer).named_parameters())
        others = [dict(stack.layer(i).named_parameters()) for i in range(hole.first, hole.last + 1)]
        _require_alike(name, run.layer, hole, own, others)
        weights_id = f"{name}-{run.layer}"
        for key, tensor in own.items():
            if norms or tensor.dim() >= 2:
                parts = [tensor.detach().float(), *(other[key].detach().to(tensor.device).float() for other in others)]
                weights[f"{weights_id}.{key}"] = rule(key, parts, hole).to(tensor.dtype).contiguous()
        steps[hole.position - 1] = Run(run.layer, weights=weights_id, kv=run.kv, gate=run.gate)
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), weights)


def _require_alike(
    name: str, layer: int, hole: Hole, own: dict[str, torch.nn.Parameter], others: list[dict[str, torch.nn.Parameter]]
) -> None:
    for index, other in enumerate(others, hole.first):
        shapes = [{key: p.shape for key, p in one.items()} for one in (own, other)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"{name} cannot merge layer {index} into {layer}: their tensors differ; merge layers of one kind",
                code="U556",
            )
    if any(p.is_meta or not p.is_floating_point() for one in (own, *others) for p in one.values()):
        raise UsageError(
            f"{name} needs the weights of layer {layer} in memory and not quantised; load the model so", code="U556"
        )


def middle(job: Job, first: int | None, last: int | None) -> tuple[int, int]:
    """`first` and `last`, or where they are not given the ends of the middle half of the stack."""
    depth = job.plan.depth(job.stack)
    quarter = depth // 4
    return quarter if first is None else first, depth - quarter - 1 if last is None else last


def share_in(t: float, name: str) -> float:
    """`t` itself when it is a share. Raises U558."""
    if not 0 <= t <= 1:
        raise UsageError(f"{name} takes t from 0 (the kept layer alone) to 1, not {t:g}", code="U558")
    return t
