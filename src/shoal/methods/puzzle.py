"""Puzzle's search: one choice per layer by integer programming."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.milp import milp

SEARCHES = True
EXAMPLES = MethodExamples(
    chooses_by="loss", counts="budget", exact=False, nested=False, writable=False, best_first=True
)


def puzzle(job: PruningJob, *, rounds: int = 2) -> Found:
    """Choose for each layer keep, no attention, no mlp or nothing, by an integer programme over measured losses.

    Source: Bercovich et al. 2024 (Puzzle, arXiv 2411.19146), its search alone.

    How we differ: no replacement blocks are trained, and the solution is measured end to end and improved in further
    rounds. Raises U540 without a budget.
    """
    if job.budget is None:
        raise UsageError("puzzle needs a budget, not a number of layers; write --budget params=0.8", code="U540")
    return milp(
        job.plan,
        objective=job.objective(job.data),
        budget=job.budget,
        rounds=rounds,
        legal=job.legal,
        stack=job.stack,
        progress=job.progress,
    )
