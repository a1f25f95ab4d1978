"""ReplaceMe: a span is replaced by a linear map inside the mlp before it."""

from __future__ import annotations

from shoal.examples import MethodExamples
from shoal.measures.cosine_span import cosine_span
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.contiguous import contiguous
from shoal.transforms import replaceme as transform

EXAMPLES = MethodExamples(nested=False)


def replaceme(job: PruningJob, *, drop: int, ridge: float | None = None) -> Found:
    """Remove the span that turns the state least, and multiply a fitted map into the mlp before it.

    Source: Shopkhoev et al. 2025 (ReplaceMe, arXiv 2505.02819).

    How we differ: see the transform `replaceme`.
    """
    scores = cosine_span(job.model, job.data, span=drop, stack=job.stack, batch=job.batch, progress=job.progress)
    found = contiguous(job.plan, scores=scores, drop=drop, legal=job.legal, stack=job.stack)
    return job.then(transform.replaceme, found, ridge=ridge)
