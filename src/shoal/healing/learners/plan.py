"""What the plan brought along."""

from __future__ import annotations

import torch
from torch import nn

from shoal.healing.moving import LearnJob, Moving, Tensors, nothing_moves
from shoal.plan import Plan

STAND_STILL = (".limit", ".probe", ".probe_bias")
"""What no formula of a term depends on."""


def plan(job: LearnJob) -> Moving:
    """The tensors that the plan names already: maps in the place of removed layers, replaced layers, lenses.

    They keep their names, so the plan stays what it is; what a transform has fitted learns on.

    Source: the stand-ins of Chen et al. 2024 (LLM-Streamline, arXiv 2403.19135), which learn on the language loss.
    """
    moving = {
        name: nn.Parameter(tensor.detach().float().clone())
        for name, tensor in job.weights.items()
        if tensor.is_floating_point() and not name.endswith(STAND_STILL)
    }
    if not moving:
        raise nothing_moves("plan")

    def finish(others: Tensors) -> tuple[Plan, dict[str, torch.Tensor]]:
        made = {name: p.detach().to(job.weights[name].dtype).contiguous() for name, p in moving.items()}
        return job.plan, {**others, **made}

    return Moving(job.plan, {**job.weights, **moving}, moving, finish)
