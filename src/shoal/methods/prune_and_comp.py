"""Prune&Comp: layers go one by one, and the magnitude that each took along is given back."""

from __future__ import annotations

from shoal.measures.block_influence import block_influence
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.one_shot import one_shot
from shoal.transforms.compensate import compensate


def prune_and_comp(job: PruningJob, *, drop: int) -> Found:
    """Remove the layers of lowest block influence and scale the state at each hole to the magnitude it had.

    Source: Prune&Comp 2025 (arXiv 2507.18212), with block influence as its criterion.

    How we differ: the layers are chosen in one shot, not anew after each compensation; see the transform `compensate`.
    """
    scores = block_influence(job.model, job.data, stack=job.stack, batch=job.batch, progress=job.progress)
    found = one_shot(job.plan, scores=scores, drop=drop, legal=job.legal, stack=job.stack)
    return job.then(compensate, found)
