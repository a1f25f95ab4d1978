"""Shortened LLaMA: one shot by gradients, or by the perplexity without each layer."""

from __future__ import annotations

from typing import Literal

from shoal.examples import MethodExamples
from shoal.measures.loss_removed import loss_removed
from shoal.measures.taylor import taylor
from shoal.methods._job import PruningJob
from shoal.plan import Plan
from shoal.scores import Found
from shoal.search.one_shot import one_shot

EXAMPLES = MethodExamples(chooses_by="loss")


def shortened_llama(
    job: PruningJob, *, drop: int, by: Literal["taylor", "perplexity"] = "taylor", first: int = 4, last: int = 2
) -> Found:
    """Remove the layers with the lowest Taylor score, or without which perplexity is lowest, all at once.

    By `taylor` the `first` and the `last` so many layers stay (the paper's Taylor+), unless fewer than `drop` others
    are left. By `perplexity` nothing is protected, as in the paper, and the result is that of `loss-one-shot`.

    Source: Kim et al. 2024 (arXiv 2402.02834).

    How we differ: no retraining follows here.
    """
    if by == "perplexity":
        scores = loss_removed(job.model, job.data, stack=job.stack, batch=job.batch, progress=job.progress)
        return one_shot(job.plan, scores=scores, drop=drop, legal=job.legal, stack=job.stack)
    scores = taylor(job.model, job.data, stack=job.stack, batch=job.batch, progress=job.progress)
    depth = job.plan.depth(job.stack)
    kept = {*range(first), *range(depth - last, depth)} if depth - first - last >= drop else set[int]()
    whole = set(job.plan.layers(job.stack))

    def legal(plan: Plan) -> bool:
        return kept & whole <= set(plan.layers(job.stack)) and job.legal(plan)

    return one_shot(job.plan, scores=scores, drop=drop, legal=legal, stack=job.stack)
