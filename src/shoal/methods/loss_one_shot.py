"""Loss when removed, one shot: what re-evaluation is worth can be seen beside SLEB."""

from __future__ import annotations

from shoal.measures.loss_removed import loss_removed
from shoal.methods._task import Task
from shoal.scores import Found
from shoal.search.one_shot import one_shot


def loss_one_shot(task: Task, *, drop: int) -> Found:
    """Remove the layers whose removal, one at a time, raises the cross-entropy least, all at once.

    Source: the perplexity criterion of Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834), without its retraining.
    How we differ: the paper protects the first four and last two layers by hand; here nothing is protected.
    """
    scores = loss_removed(task.model, task.data, stack=task.stack, batch=task.batch, progress=task.progress)
    return one_shot(task.plan, scores=scores, drop=drop, legal=task.legal, stack=task.stack)
