"""SLEB: remove one layer at a time by the loss of what is left."""

from __future__ import annotations

from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.greedy import greedy

SEARCHES = True
EXAMPLES = MethodExamples(chooses_by="loss")


def sleb(job: PruningJob, *, drop: int, exhaustive: bool = False) -> Found:
    """In each round remove the layer without which the cross-entropy on the calibration data is lowest.

    Source: Song et al. 2024 (arXiv 2402.09025), metric 3.

    How we differ: the model is not rebuilt for a candidate, candidates share hidden states and race (`exhaustive=true`
    evaluates each in full, as the released code does), and what was evaluated is kept in the journal, so that a run
    that was cut off goes on where it was.
    """
    return greedy(
        job.plan,
        objective=job.objective(job.data),
        drop=drop,
        legal=job.legal,
        exhaustive=exhaustive,
        stack=job.stack,
        progress=job.progress,
    )
