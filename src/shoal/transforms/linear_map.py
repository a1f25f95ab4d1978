"""A linear map in the place of removed layers, fitted by least squares on the pruned stream."""

from __future__ import annotations

import torch

from shoal.examples import TransformExamples
from shoal.fitting.holes import Hole, Pair, filled, find_holes
from shoal.fitting.maps import judged, limit_tensor, sums
from shoal.fitting.normal import best_ridge
from shoal.fitting.result import Fit, Job, Transformed

EXAMPLES = TransformExamples(role="fitted", refused=(((2,), {"skip_first": 24}, "U554"),))


def linear_map(
    job: Job, *, ridge: float | None = None, bias: bool = True, skip_first: int = 1, outlier: float = 8.0
) -> Transformed:
    """Put a fitted map y = W x + b where layers, attentions or mlps were removed.

    W, b = argmin sum |W x + b - y|^2 + ridge * mean(x^2) * |W - I|^2 over the calibration tokens, x [hidden] the state
    of the model as pruned so far (earlier maps included), y [hidden] the dense model's state behind the removed span,
    by normal equations in float64. The regularisation pulls towards the identity, which is what dropping does, so the
    map never fits the calibration tokens worse than dropping. `ridge` None: the one of eight that does best on a
    quarter of the sequences, held back. `skip_first` tokens of each sequence and tokens longer than `outlier` medians
    are not fitted; the latter are not mapped either (the tensor `limit`): a map applied to an attention sink destroys
    the model. Runs live only; see `replaceme` and `refit` for stand-ins that a stock checkpoint can hold.

    Source: Razzhigaev et al. 2024 (Your Transformer is Secretly Linear, arXiv 2405.12250).

    How we differ: fitted on the pruned stream, regularised towards the identity, sinks protected.
    """
    holes = find_holes(job.plan, "linear-map", job.stack)
    pair = Pair(job, skip_first=skip_first, outlier=outlier)
    return filled(pair, holes, lambda hole: _fit_map(pair, hole, ridge=ridge, bias=bias), "linear maps")


def _fit_map(pair: Pair, hole: Hole, *, ridge: float | None, bias: bool) -> tuple[dict[str, torch.Tensor], Fit]:
    """The tensors weight, bias and limit for `hole`, at which the pruned stream stands, and how well they fit."""
    limit = pair.limit()
    fitted, held = sums(pair, hole, limit)
    eye = torch.eye(fitted.inputs, dtype=torch.float64, device=fitted.xx.device)
    if ridge is None:
        ridge, weight, shift = best_ridge(fitted, held, bias=bias, towards=eye)
    else:
        weight, shift = fitted.solve(ridge, bias=bias, towards=eye)
    tensors = {f"{hole.weights}.weight": weight.float()}
    if shift is not None:
        tensors[f"{hole.weights}.bias"] = shift.float()
    return tensors | limit_tensor(hole, limit), judged(hole, fitted, held, weight, shift, f"ridge {ridge:g}")
