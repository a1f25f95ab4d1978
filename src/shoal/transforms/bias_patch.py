"""The mean of what was removed, added back: one vector in the place of each hole."""

from __future__ import annotations

import torch

from shoal.examples import TransformExamples
from shoal.fitting.holes import Hole, Pair, filled, find_holes
from shoal.fitting.maps import limit_tensor, sums
from shoal.fitting.result import Fit, Job, Transformed

EXAMPLES = TransformExamples(role="fitted")


def bias_patch(job: Job, *, skip_first: int = 1, outlier: float = 8.0) -> Transformed:
    """Put y = x + b where layers, attentions or mlps were removed, b = mean(y - x) over the calibration tokens.

    x [hidden] is the state of the model as pruned so far, y [hidden] the dense model's state behind the span. A step of
    hidden additions; runs live only, as stock layers have no bias there. The mean makes the squared error smallest, so
    it is never worse than dropping. Tokens longer than `outlier` medians (attention sinks) and the first `skip_first`
    are not fitted; the longer ones are not patched either.

    Source: our own; it is `linear-map` with W = I.
    """
    holes = find_holes(job.plan, "bias-patch", job.stack)
    pair = Pair(job, skip_first=skip_first, outlier=outlier)
    return filled(pair, holes, lambda hole: _fit_bias(pair, hole), "bias patches")


def _fit_bias(pair: Pair, hole: Hole) -> tuple[dict[str, torch.Tensor], Fit]:
    """The tensors scale, bias and limit for `hole`, at which the pruned stream stands, and how well they fit."""
    limit = pair.limit()
    fitted, held = sums(pair, hole, limit)
    bias = (fitted.y - fitted.x) / fitted.count
    eye = torch.eye(len(bias), dtype=torch.float64, device=bias.device)
    kept: tuple[float | None, float | None] = (None, None) if held is None else (held.error(eye), held.error(eye, bias))
    tensors = {f"{hole.weights}.scale": torch.ones(len(bias)), f"{hole.weights}.bias": bias.float().cpu()}
    tensors |= limit_tensor(hole, limit)
    return tensors, Fit(str(hole), fitted.error(eye), fitted.error(eye, bias), *kept)
