"""Prune&Comp: layers go one by one, and the magnitude that each took along is given back."""

from __future__ import annotations

from dataclasses import replace

from shoal.live import running
from shoal.measures.block_influence import block_influence
from shoal.methods._job import PruningJob
from shoal.scores import Candidate, Found
from shoal.search.one_shot import one_shot
from shoal.transforms.compensate import compensate


def prune_and_comp(job: PruningJob, *, drop: int, once: bool = False) -> Found:
    """Remove the layer of lowest block influence, scale the state at the hole to the magnitude it had, and look again.

    In each of `drop` rounds block influence is measured on the model as pruned and compensated so far. `once`: on the
    whole model alone, whose `drop` lowest layers go together.

    Source: Prune&Comp 2025 (arXiv 2507.18212), with block influence as its criterion.

    How we differ: all scales are found anew in every round, from the dense model's states; see the transform
    `compensate`.
    """
    rounds = 1 if once else drop
    made, trace = Found(job.plan), list[Candidate]()
    bare = job.plan
    for number in range(rounds):
        with running(job.model, made.plan, made.weights):
            scores = block_influence(
                job.model, job.data, stack=job.stack, batch=job.batch, progress=job.in_round(number, rounds)
            )
        found = one_shot(bare, scores=scores, drop=drop // rounds, legal=job.legal, stack=job.stack)
        trace += found.trace
        bare, made = found.plan, replace(job, progress=None).then(compensate, found)
    return replace(made, trace=tuple(trace))
