"""Leave or stay: at each exit a linear decision, learned from the last exit to the first for what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shoal.data import Data
from shoal.evaluation.exits import exit_places
from shoal.executing.weights import Tensors
from shoal.fitting.probe import as_probe, recorded_states, regressed
from shoal.plan import Plan

SURE = 30.0
"""Score of an exit at which all tokens leave; the negative one where none does."""


def fit_leave_or_stay(
    model: Any,
    plan: Plan,
    weights: Tensors,
    data: Data,
    *,
    tradeoff: float,
    batch: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, torch.Tensor]:
    """HEAD.probe [hidden] and HEAD.probe_bias [1], float32, for the head of every exit of `plan`: a token leaves where
    sigmoid(probe . x / rms(x) + bias) >= 1/2 (`exit:by=probe,confidence=0.5`).

    With W = `tradeoff` a token that leaves at exit k costs c_k = W [its likeliest token is not the whole plan's] +
    (1 - W) (layers up to k) / (layers of the plan); one that stays to the end costs v = 1 - W. From the last exit to
    the first: tokens with c_k < v are to leave, a logistic regression on the state learns that with |v - c_k| as the
    weight of a token, and v becomes c_k for those that it sends out. With W = 1 nobody leaves, with W = 0 all do at
    the first.

    Source: Bolukbasi et al. 2017 (ICML, PMLR 70): its reduction of adaptive early exit to weighted binary problems.

    How we differ: layers stand for time; the error is against the whole plan, where the paper has labels; the choice
    among networks is `shoal evaluate --cascade`. Cost as for `fit_probes`.
    """
    recorded = recorded_states(model, plan, weights, data, batch=batch, progress=progress)
    depths = exit_places(plan)[1]
    value = torch.full_like(next(iter(recorded.values()))[1], 1 - tradeoff)
    found: dict[str, torch.Tensor] = {}
    for (head, (states, right)), depth in reversed(list(zip(recorded.items(), depths, strict=False))):
        leaving = tradeoff * (1 - right) + (1 - tradeoff) * depth / depths[-1]
        gain = value - leaving
        weight, bias = _decision(states, gain)
        found |= as_probe(head, weight, bias)
        value = torch.where(states @ weight + bias >= 0, leaving, value)
    return found


def _decision(states: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [hidden] and b []: w . x + b >= 0 where leaving is worth more than staying, as far as a line can tell."""
    leaves = gain > 0
    if not leaves.any() or not (gain < 0).any():  # one answer for all, which no line needs to learn
        return torch.zeros_like(states[0]), gain.new_tensor(SURE if leaves.any() else -SURE)
    return regressed(states, leaves.to(gain.dtype), gain.abs())
