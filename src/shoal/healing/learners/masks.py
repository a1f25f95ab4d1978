"""The embeddings of mask tokens."""

from __future__ import annotations

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.executing.mask_tokens import masks_in, mean_embedding
from shoal.healing.moving import LearnJob, Moving, Tensors, nothing_moves, whole_runs, with_weights
from shoal.plan import Plan
from shoal.plan.around import MASKS

ID = "s3d"


def masks(job: LearnJob, *, count: int = 3) -> Moving:
    """Embeddings [count, hidden] of `count` mask tokens, which the draft `s3d` puts behind a text. All else stands
    still.

    They stand beside the plan's first layer as ID.masks, which a plain forward does not read, so the plan computes what
    it did. They begin as the mean embedding, or as the plan has them already.

    Source: S3D (Zhong & Bharadwaj, arXiv 2405.20314).
    """
    if count < 1:
        raise UsageError(f"masks: count={count} is no mask; write masks:count=3", code="U502")
    runs = whole_runs(job)
    if not runs:
        raise nothing_moves("masks")
    first = runs[0]
    weights_id = first.weights or ID
    name = f"{weights_id}.{MASKS}"
    start = mean_embedding(job.opened.model).expand(count, -1)
    if (known := masks_in(job.weights)) is not None:
        start = torch.cat([known.to(start)[:count], start[len(known) :]])
    moving = {name: nn.Parameter(start.detach().float().clone().contiguous())}
    plan = with_weights(job.plan, job.stack, {(first.layer, first.weights): weights_id})
    dtype = job.opened.model.dtype

    def finish(others: Tensors) -> tuple[Plan, dict[str, torch.Tensor]]:
        return plan, {**others, **{name: p.detach().to(dtype).contiguous() for name, p in moving.items()}}

    return Moving(plan, {**job.weights, **moving}, moving, finish)
