"""The mean of the kept layer and the removed ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.examples import TransformExamples
from shoal.fitting.holes import Hole
from shoal.fitting.merge import merged, share_in
from shoal.fitting.result import Job, Transformed

EXAMPLES = TransformExamples(role="merge", null={"t": 0.0}, refused=(((0,), {}, "U557"),))


def weighted_average(job: Job, *, t: float = 0.5, norms: bool = True) -> Transformed:
    """Merge each removed span into the layer before it: (1 - t) theta_l + t * mean_k theta_(l+k).

    `t` 0 is dropping, bit for bit, `t` 1 the mean of the removed layers alone; equal layers stay as they are for any t.

    Source: the averaging of weights (model soups, Wortsman et al. 2022, arXiv 2203.05482), of layers of one model here.

    Raises U558 for a t outside 0 to 1.
    """
    share_in(t, "weighted-average")

    def rule(_: str, parts: Sequence[torch.Tensor], hole: Hole) -> torch.Tensor:
        differences = sum((other - parts[0] for other in parts[1:]), torch.zeros_like(parts[0]))
        return parts[0] + t * differences / (hole.last - hole.first + 1)

    return merged(job, "weighted-average", rule, norms=norms)
