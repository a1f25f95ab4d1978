"""The mean of what was removed, added back: one vector in the place of each hole."""

from __future__ import annotations

import torch

from shoal.examples import TransformExamples
from shoal.fitting.holes import Pair, find_holes
from shoal.fitting.maps import limit_tensor, sums
from shoal.fitting.result import Fit, Job, Transformed
from shoal.plan import Map, Step

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
    steps: list[Step] = []
    weights = dict(job.weights)
    fits: list[Fit] = []
    for number, hole in enumerate(holes):
        steps += pair.steps[pair.cursor : hole.position]
        pair.prune_to(hole.position)
        limit = pair.limit()
        fitted, held = sums(pair, hole, limit)
        bias = (fitted.y - fitted.x) / fitted.count
        eye = torch.eye(len(bias), dtype=torch.float64, device=bias.device)
        kept: tuple[float | None, float | None] = (
            (None, None) if held is None else (held.error(eye), held.error(eye, bias))
        )
        fits.append(Fit(str(hole), fitted.error(eye), fitted.error(eye, bias), *kept))
        tensors = {f"{hole.weights}.scale": torch.ones(len(bias)), f"{hole.weights}.bias": bias.float().cpu()}
        tensors |= limit_tensor(hole, limit)
        weights |= tensors
        steps.append(Map(hole.first, hole.last, hole.weights))
        pair.pruned.advance(steps[-1], tensors)
        job.tell(number + 1, len(holes), "bias patches")
    steps += pair.steps[pair.cursor :]
    return Transformed(job.plan.with_steps(tuple(steps), job.stack), weights, tuple(fits))
