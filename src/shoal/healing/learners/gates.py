"""The tensors of a policy."""

from __future__ import annotations

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.healing.moving import LearnJob, Moving, Tensors
from shoal.plan import Plan


def gates(job: LearnJob) -> Moving:
    """The tensors with which a policy decides: routers, halting units. All else stands still.

    They begin as the policy says, or as they are where the plan has them already, and stay float32.

    Source: routers on a model that stands still, as the first of the two steps of Jain et al. 2024 (FiRST, arXiv
    2410.12513).
    """
    begun = {} if job.policy is None else job.policy.start(job.opened.spec)
    if not begun:
        raise UsageError(
            "gates finds no policy whose tensors could learn; give a recipe that has one, as skip-layer", code="U675"
        )
    start = {name: job.weights.get(name, tensor) for name, tensor in begun.items()}
    device = job.opened.device
    moving = {name: nn.Parameter(one.detach().float().clone().to(device)) for name, one in start.items()}

    def finish(others: Tensors) -> tuple[Plan, dict[str, torch.Tensor]]:
        return job.plan, {**others, **{name: p.detach().contiguous() for name, p in moving.items()}}

    return Moving(job.plan, {**job.weights, **moving}, moving, finish)
