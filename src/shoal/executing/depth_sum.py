"""Sums over the states of several depths, as runs and heads read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

Behind = Mapping[int, torch.Tensor]
"""By base layer the state [batch, tokens, hidden] behind its latest run in this forward; -1: what came in."""


def depth_sum(
    hidden: torch.Tensor, keeps: torch.Tensor | None, read: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """keeps x + sum_N w_N h_N for the state `hidden` = x, [batch, tokens, hidden]; without `keeps` x itself is kept.

    `keeps`: [1] or [hidden]. `read`: each w_N, [1], [hidden] or [hidden, hidden], with its state h_N.
    """
    total = hidden if keeps is None else keeps * hidden
    for weight, state in read:
        there = state.to(hidden.device)
        total = total + (nn.functional.linear(there, weight) if weight.dim() > 1 else weight * there)
    return total
