"""Position presets as a baseline."""

from __future__ import annotations

from typing import Literal

from shoal.methods._task import Task
from shoal.scores import Found
from shoal.search import position as presets

READS_DATA = False


def position(
    task: Task, *, drop: int, which: Literal["first", "last", "middle", "alternate", "random"] = "last"
) -> Found:
    """Remove the first, last, middle, every other or random layers, without looking at data.

    Source: Poor Man's BERT (Sajjad et al. 2020, arXiv 2004.03844). How we differ: the paper's top, bottom and symmetric
    are called last, first and middle, the contribution-based choice is `shortgpt`, and no task is learnt afterwards.
    """
    return presets.position(task.plan, drop=drop, legal=task.legal, which=which, stack=task.stack, seed=task.seed)
