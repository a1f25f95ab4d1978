"""Prune&Comp: layers go one by one, and the magnitude that each took along is given back."""

from __future__ import annotations

from shoal.measures.block_influence import block_influence
from shoal.methods._task import Task
from shoal.scores import Found
from shoal.search.one_shot import one_shot
from shoal.transforms.compensate import compensate


def prune_and_comp(task: Task, *, drop: int) -> Found:
    """Remove the layers of lowest block influence and scale the state at each hole to the magnitude it had.

    Source: Prune&Comp 2025 (arXiv 2507.18212), with block influence as its criterion. How we differ: the layers are
    chosen in one shot, not anew after each compensation; see the transform `compensate`.
    """
    scores = block_influence(task.model, task.data, stack=task.stack, batch=task.batch, progress=task.progress)
    found = one_shot(task.plan, scores=scores, drop=drop, legal=task.legal, stack=task.stack)
    return task.then(compensate, found)
