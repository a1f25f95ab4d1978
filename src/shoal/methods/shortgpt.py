"""ShortGPT: block influence, one shot."""

from __future__ import annotations

from shoal.measures.block_influence import block_influence
from shoal.methods._task import Task
from shoal.scores import Found
from shoal.search.one_shot import one_shot


def shortgpt(task: Task, *, drop: int, skip_first: int = 0) -> Found:
    """Remove the layers that turn the hidden state least (block influence), all at once.

    Source: Men et al. 2024 (arXiv 2403.03853). How we differ: see `block-influence`; the paper calibrates on PG19.
    """
    scores = block_influence(
        task.model, task.data, skip_first=skip_first, stack=task.stack, batch=task.batch, progress=task.progress
    )
    return one_shot(task.plan, scores=scores, drop=drop, legal=task.legal, stack=task.stack)
