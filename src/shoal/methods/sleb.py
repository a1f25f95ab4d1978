"""SLEB: remove one layer at a time by the loss of what is left."""

from __future__ import annotations

from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.plan import Plan
from shoal.scores import Found
from shoal.search.greedy import greedy

SEARCHES = True
EXAMPLES = MethodExamples(chooses_by="loss")


def sleb(job: PruningJob, *, drop: int, exhaustive: bool = False, ends: int = 0) -> Found:
    """In each round remove the layer without which the cross-entropy on the calibration data is lowest.

    `ends`: so many layers at either end stay; the released code keeps one.

    Source: Song et al. 2024 (arXiv 2402.09025), metric 3.

    How we differ: the model is not rebuilt for a candidate, candidates share hidden states and race (`exhaustive=true`
    evaluates each in full, as the released code does), and what was evaluated is kept in the journal, so that a run
    that was cut off goes on where it was.
    """
    layers = job.plan.layers(job.stack)
    kept = {*layers[:ends], *layers[len(layers) - ends :]}

    def legal(plan: Plan) -> bool:
        return kept <= set(plan.layers(job.stack)) and job.legal(plan)

    return greedy(
        job.plan,
        objective=job.objective(job.data),
        drop=drop,
        legal=legal,
        exhaustive=exhaustive,
        stack=job.stack,
        progress=job.progress,
    )
