"""The Unreasonable Ineffectiveness of the Deeper Layers: the span with the smallest angle."""

from __future__ import annotations

from typing import Literal

from shoal.examples import MethodExamples
from shoal.measures.angular_distance import angular_distance
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.contiguous import contiguous

EXAMPLES = MethodExamples(nested=False)


def gromov(job: PruningJob, *, drop: int, tokens: Literal["last", "all"] = "last") -> Found:
    """Remove the span of neighbouring layers whose input and end are nearest in angle.

    Source: Gromov et al. 2024 (arXiv 2403.17887).

    How we differ: healing by QLoRA is a step of its own.
    """
    scores = angular_distance(
        job.model, job.data, span=drop, tokens=tokens, stack=job.stack, batch=job.batch, progress=job.progress
    )
    return contiguous(job.plan, scores=scores, drop=drop, legal=job.legal, stack=job.stack)
