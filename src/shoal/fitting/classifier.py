"""A linear classifier: the softmax regression of labels on vectors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize

from shoal.models.precision import in_float64


class Classifier(NamedTuple):
    """Scores of classes are ((x - mean) / spread) @ weights + bias."""

    mean: torch.Tensor
    spread: torch.Tensor
    weights: torch.Tensor
    """[features, classes]"""
    bias: torch.Tensor
    """[classes]"""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The likeliest class of each row of x [n, features], int64 [n]."""
        return (((x - self.mean) / self.spread) @ self.weights + self.bias).argmax(-1)


def fit_classifier(x: torch.Tensor, y: torch.Tensor, classes: int, ridge: float) -> Classifier:
    """The softmax regression of y [n], in 0 .. classes - 1, on x [n, features], float64 on the CPU.

    It minimises the mean cross-entropy, in which every class that occurs weighs the same, plus ridge / 2 times the
    squares of the weights on standardised features; the intercepts are free. By L-BFGS from zero: the same data gives
    the same classifier.
    """
    mean, spread = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    scaled = (x - mean) / spread
    sizes = in_float64(torch.bincount(y, minlength=classes))
    share = (1 / (sizes * (sizes > 0).sum()))[y]
    wanted = in_float64(torch.nn.functional.one_hot(y, classes))

    def value(at: np.ndarray) -> tuple[float, np.ndarray]:
        both = torch.from_numpy(at).view(-1, classes)
        logs = (scaled @ both[:-1] + both[-1]).log_softmax(-1)
        slope = (logs.exp() - wanted) * share[:, None]
        loss = -((logs * wanted).sum(-1) * share).sum() + ridge / 2 * both[:-1].square().sum()
        return float(loss), torch.cat([scaled.T @ slope + ridge * both[:-1], slope.sum(0)[None]]).numpy().ravel()

    start = np.zeros((x.shape[1] + 1) * classes)
    found = minimize(value, start, jac=True, method="L-BFGS-B", options={"maxiter": 200})
    both = torch.from_numpy(found.x).view(-1, classes)
    return Classifier(mean, spread, both[:-1], both[-1])
