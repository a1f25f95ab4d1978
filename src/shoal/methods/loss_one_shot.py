"""Loss when removed, one shot: what re-evaluation is worth can be seen beside SLEB."""

from __future__ import annotations

from shoal.examples import MethodExamples
from shoal.measures.loss_removed import loss_removed
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.one_shot import one_shot

EXAMPLES = MethodExamples(chooses_by="loss")


def loss_one_shot(job: PruningJob, *, drop: int) -> Found:
    """Remove the layers whose removal, one at a time, raises the cross-entropy least, all at once.

    Source: the perplexity criterion of Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834),.

    How we differ: no retraining follows. It is `shortened-llama:by=perplexity`; like the paper, which keeps the first
    four and the last two layers by hand for its Taylor and magnitude criteria alone, it protects nothing.
    """
    scores = loss_removed(job.model, job.data, stack=job.stack, batch=job.batch, progress=job.progress)
    return one_shot(job.plan, scores=scores, drop=drop, legal=job.legal, stack=job.stack)
