"""Secretly Linear: the most linear layers are replaced by their linear maps."""

from __future__ import annotations

from shoal.examples import MethodExamples
from shoal.measures.linearity import linearity
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.one_shot import one_shot
from shoal.transforms.linear_map import linear_map

EXAMPLES = MethodExamples(writable=False)


def secretly_linear(job: PruningJob, *, drop: int, replace: bool = True) -> Found:
    """Remove the layers that a linear map explains best, and (`replace`) put fitted maps in their place.

    Source: Razzhigaev et al. 2024 (arXiv 2405.12250).

    How we differ: linearity is judged on held-out text, the maps are fitted on the pruned stream with attention sinks
    protected, and no distillation follows. Maps run live only.
    """
    scores = linearity(job.model, job.data, stack=job.stack, batch=job.batch, progress=job.progress)
    found = one_shot(job.plan, scores=scores, drop=drop, legal=job.legal, stack=job.stack)
    return job.then(linear_map, found) if replace else found
