"""ShortGPT: block influence, one shot."""

from __future__ import annotations

from shoal.measures.block_influence import block_influence
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.one_shot import one_shot


def shortgpt(job: PruningJob, *, drop: int, skip_first: int = 0) -> Found:
    """Remove the layers that turn the hidden state least (block influence), all at once.

    Source: Men et al. 2024 (arXiv 2403.03853).

    How we differ: see `block-influence`; the paper calibrates on PG19.
    """
    scores = block_influence(
        job.model, job.data, skip_first=skip_first, stack=job.stack, batch=job.batch, progress=job.progress
    )
    return one_shot(job.plan, scores=scores, drop=drop, legal=job.legal, stack=job.stack)
