"""The layers that a measure finds most important."""

from __future__ import annotations

import math
from importlib import import_module

from shoal.errors import UsageError
from shoal.healing.moving import LearnJob, Moving, cloned, whole_runs
from shoal.scores import Traits
from shoal.spelling import chosen


def top(job: LearnJob, *, count: int = 4, by: str = "block-influence") -> Moving:
    """All tensors of the `count` layers that a measure scores highest among those that the plan runs.

    `by` names any measure (`shoal ls measures`), as block-influence or linearity:norm=true; it is taken on the training
    text, of the whole model, before anything learns.

    Source: ALaST (Devoto et al. 2024, arXiv 2408.08670) and ILA (Shi et al. 2024, arXiv 2410.17875), which train the
    layers that matter and freeze the others.

    How we differ: they choose anew while they train; here the choice is made once.
    """
    if count < 1:
        raise UsageError(f"top: count={count} is no layer; write top:count=4", code="U502")
    entry, options = chosen("measures", by)
    traits: Traits = getattr(import_module(entry.module), "TRAITS", Traits())
    text = None if job.data is None or not traits.text else job.data.only(range(min(8, len(job.data))))
    scores = entry.load()(job.opened.model, text, stack=job.stack, batch=job.batch, **options)
    runs = whole_runs(job)
    order = sorted(runs, key=lambda run: -_known(scores.values[run.layer]))
    return cloned(job, sorted(order[:count], key=runs.index), "top")


def _known(score: float) -> float:
    """A layer that could not be judged goes last."""
    return -math.inf if math.isnan(score) else score
