"""A method in a file of your own: of the middle layers, those go that turn the hidden state least.

    shoal prune MODEL --method examples/thin_middle.py --drop 2 --set keep_first=1 --output OUT

A method is called with the task (model, text, plan, what is legal, ...) and the number of layers to remove, and answers
with a plan. It usually is a measure and a search, as here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.measures.block_influence import block_influence
from shoal.scores import Found
from shoal.search.one_shot import one_shot


def thin_middle(task: Any, *, drop: int, keep_first: int = 1, keep_last: int = 1) -> Found:
    """Block influence, one shot, with the first and the last layers safe."""
    scores = block_influence(task.model, task.data, stack=task.stack, batch=task.batch, progress=task.progress)
    depth = len(scores.values)
    safe = {*range(keep_first), *range(depth - keep_last, depth)}
    values = tuple(float("inf") if layer in safe else value for layer, value in enumerate(scores.values))
    return one_shot(task.plan, scores=replace(scores, values=values), drop=drop, legal=task.legal, stack=task.stack)
