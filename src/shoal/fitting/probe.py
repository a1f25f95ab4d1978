"""Probes: is an exit right about a token? Read off the state alone, so that asking costs no head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch.nn.functional import binary_cross_entropy_with_logits

from shoal.data import Data
from shoal.deciding.decisions import Decision
from shoal.deciding.exit_view import ExitView
from shoal.deciding.forward import ForwardView
from shoal.deciding.policy import Policy
from shoal.evaluation.scoring import logits_of
from shoal.executing.exit_heads import scaled
from shoal.executing.weights import Tensors
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.models.precision import in_float64
from shoal.plan import Exit, Plan

MOST = 16_384
"""Tokens that are kept for each exit, evenly over the text."""
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


def fit_probes(
    model: Any,
    plan: Plan,
    weights: Tensors,
    data: Data,
    *,
    batch: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, torch.Tensor]:
    """HEAD.probe [hidden] and HEAD.probe_bias [1], float32, for the head of every exit of `plan`.

    w, b maximise the likelihood of sigmoid(w . x / rms(x) + b) for the label "the exit's likeliest token, through its
    lens or head in `weights`, is the whole plan's", with a ridge on w over standardised inputs; the last quarter of the
    tokens chooses the ridge. x [hidden] is the state at the exit; the first token of a sequence does not count.

    Source: learning to exit, Xin et al. 2021 (BERxiT, EACL): a linear map of the state. How we differ: fitted on a
    frozen model, and calibrated afterwards like any other signal. Cost: one pass, the head once for each exit, and at
    most `MOST` states for each.
    """
    found: dict[str, torch.Tensor] = {}
    for head, (states, right) in recorded_states(model, plan, weights, data, batch=batch, progress=progress).items():
        weight, bias = regressed(states, right)
        found |= as_probe(head, weight, bias)
    return found


def as_probe(head: str, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of the probe of `head`, of weight [hidden] and bias []."""
    return {f"{head}.probe": weight.float(), f"{head}.probe_bias": bias.float()[None]}


def recorded_states(
    model: Any,
    plan: Plan,
    weights: Tensors,
    data: Data,
    *,
    batch: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By head, in the order of the exits: states [n, hidden] with a root mean square of 1, and whether the exit's
    likeliest token is the whole plan's, [n], 0 or 1; both float64 on the CPU, and row i is the same token at each."""
    seen = _Seen(plan)
    stride = max(1, -(-data.ids.numel() // MOST))
    done = counted = 0
    for ids, mask in data.batches(batch):
        seen.now = []
        with running(model, plan, weights, policy=seen), evaluating(model):
            final = logits_of(model, ids, mask).argmax(-1).cpu()
        real = torch.ones_like(final, dtype=torch.bool) if mask is None else mask.bool().cpu()
        real &= real.cumsum(-1) > 1
        for head, state, choice in seen.now:
            own, right = state[real.to(state.device)], (choice.cpu() == final)[real]  # each layer has its own device
            # counted over the whole text, so that every place of a sequence has its turn
            part = slice(-counted % stride, None, stride)
            seen.kept.setdefault(head, []).append((own[part].cpu(), right[part].cpu().double()))
        counted += int(real.sum())
        done += len(ids)
        if progress is not None:
            progress(done, len(data), "fitting probes")
    return {
        head: (in_float64(torch.cat([states for states, _ in pieces])), torch.cat([right for _, right in pieces]))
        for head, pieces in seen.kept.items()
    }


def regressed(
    x: torch.Tensor, y: torch.Tensor, counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """w [hidden] and b of the logistic regression of y [n] on x [n, hidden], row i counting `counts` [n] times; the
    last quarter of the rows chooses the ridge."""
    counts = torch.ones_like(y) if counts is None else counts / counts.mean()
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    scaled_x = (x - mean) / spread
    cut = len(y) - len(y) // 4
    fitted, held = (scaled_x[:cut], y[:cut], counts[:cut]), (scaled_x[cut:], y[cut:], counts[cut:])
    tried = [_logistic(*fitted, ridge) for ridge in RIDGES]
    best = min(tried, key=lambda w: _loss(w, *held)) if len(held[1]) else tried[-1]
    weight = best[:-1] / spread
    return weight, best[-1] - (weight * mean).sum()


def _logistic(x: torch.Tensor, y: torch.Tensor, counts: torch.Tensor, ridge: float) -> torch.Tensor:
    """[hidden + 1]: weights and intercept, by L-BFGS: Newton's method would need [hidden, hidden] at every step."""

    def value(at: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(at)
        logits = x @ weights[:-1] + weights[-1]
        slope = counts * (logits.sigmoid() - y) / len(y)
        loss = binary_cross_entropy_with_logits(logits, y, counts) + ridge / 2 * weights[:-1].square().sum()
        return float(loss), torch.cat([x.T @ slope + ridge * weights[:-1], slope.sum()[None]]).numpy()

    found = minimize(value, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return torch.from_numpy(found.x)


def _loss(weights: torch.Tensor, x: torch.Tensor, y: torch.Tensor, counts: torch.Tensor) -> float:
    return float(binary_cross_entropy_with_logits(x @ weights[:-1] + weights[-1], y, counts))


class _Seen(Policy):
    """Nobody leaves; states and choices are written down."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.now: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        self.kept: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def should_exit(self, step: Exit, forward: ForwardView, view: ExitView) -> Decision:
        self.now.append((step.head, scaled(view.hidden), view.read("choice")))
        return False
