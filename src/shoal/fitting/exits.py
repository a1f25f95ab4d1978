"""The classifier of the policy adainfer, fitted on exits that were recorded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shoal.data import Data
from shoal.deciding.decisions import Decision
from shoal.deciding.exit_view import ExitView
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import with_exits
from shoal.deciding.policy import Policy
from shoal.errors import DataError
from shoal.evaluation.scoring import logits_of
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.models.opened import open_model
from shoal.plan import Exit, Plan

STEPS = 50


@dataclass(frozen=True)
class ExitFit:
    """A logistic regression on two features of an exit, and how it does on what it was fitted on."""

    gap: float
    top: float
    bias: float
    layers: tuple[int, ...]
    share: float
    """Of the recorded exits, those whose likeliest token was the whole model's."""
    accuracy: float
    """Of the recorded exits, those that the classifier tells right."""
    exits: int

    @property
    def policy(self) -> str:
        """What `--policy` takes."""
        listed = ",".join(map(str, self.layers))
        return f"adainfer:gap={self.gap:.6g},top={self.top:.6g},bias={self.bias:.6g},layers={listed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"policy": self.policy}


def fit_adainfer(
    model: Any, data: Data, layers: Sequence[int], *, skip_first: int = 1, ridge: float = 1e-3, batch: int = 1
) -> ExitFit:
    """Record p1 - p2 and p1 at the exits behind `layers` for every real token but the first `skip_first`, and fit.

    The label is whether the exit's likeliest token is the whole model's. Minimises the mean log loss + `ridge` / 2 x
    the squared weights, by Newton's method. Cost: one pass of the whole model and the head once more for each exit.
    Raises D414 when all labels are the same, U507 while a plan is running, U581 for a layer that does not exist.
    """
    spec = open_model(model).spec
    plan = with_exits(Plan.identity(spec), spec, layers, "project")
    recorder = _Recorder(plan)
    features, labels = [], []
    for ids, mask in data.batches(batch):
        recorder.seen = []
        with running(model, Plan.identity(spec), policy=recorder), evaluating(model):
            final = logits_of(model, ids, mask).argmax(-1).cpu()
        real = torch.ones_like(final, dtype=torch.bool) if mask is None else mask.bool().cpu()
        real &= real.cumsum(-1) > skip_first
        for margin, top, choice in recorder.seen:
            # an exit may be on another device than the end of the model
            features.append(torch.stack([margin.cpu()[real], top.cpu()[real]], -1).cpu().double())
            labels.append((choice.cpu() == final)[real].cpu().double())
    x, y = torch.cat(features), torch.cat(labels)
    if y.min() == y.max():
        raise DataError(
            f"all {len(y)} recorded exits {'agree' if y[0] else 'disagree'} with the whole model, so there is nothing "
            "to tell apart; choose other exits or more text",
            code="D414",
        )
    weights = logistic(x, y, ridge)
    predicted = (x @ weights[:2] + weights[2] > 0).to(y)
    gap, top, bias = weights.tolist()
    return ExitFit(gap, top, bias, tuple(layers), float(y.mean()), float((predicted == y).to(y).mean()), len(y))


def logistic(x: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    """[features + 1]: weights and intercept of the logistic regression of y [n] in {0, 1} on x [n, features]."""
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], -1)
    penalty = torch.full((x.shape[1],), ridge, dtype=x.dtype)
    penalty[-1] = 0  # the intercept is free
    weights = torch.zeros_like(penalty)
    for _ in range(STEPS):
        p = torch.sigmoid(x @ weights)
        slope = x.T @ (p - y) / len(y) + penalty * weights
        curve = (x.T * (p * (1 - p))) @ x / len(y) + torch.diag(penalty)
        step = torch.linalg.solve(curve + 1e-12 * torch.eye(len(curve), dtype=x.dtype), slope)
        # a full step may overshoot where labels are nearly separable
        weights = weights - step * min(1.0, 10.0 / float(step.norm().clamp(min=1e-12)))
        if float(step.norm()) < 1e-10:
            break
    return weights


class _Recorder(Policy):
    """Nobody leaves; every exit is written down."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def should_exit(self, step: Exit, forward: ForwardView, view: ExitView) -> Decision:
        self.seen.append((view.read("margin"), view.read("probability"), view.read("choice")))
        return False
