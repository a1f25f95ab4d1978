"""NAS-Prune: loss and cost are searched together."""

from __future__ import annotations

from typing import Literal

from shoal.errors import UsageError
from shoal.examples import MethodExamples
from shoal.methods._job import PruningJob
from shoal.scores import Found
from shoal.search.pareto import pareto

SEARCHES = True
EXAMPLES = MethodExamples(
    quick={"trials": 8, "population": 4},
    chooses_by="loss",
    counts="budget",
    exact=False,
    nested=False,
    writable=False,
    best_first=True,
)


def nas_prune(
    job: PruningJob, *, grain: Literal["layer", "sublayers"] = "layer", trials: int = 128, population: int = 16
) -> Found:
    """Search loss and cost together and take the plan of lowest loss within the budget; the trace holds the front.

    Source: Klein et al. 2024 (arXiv 2405.02267).

    How we differ: see the search `pareto`. Raises U540 without a budget.
    """
    if job.budget is None:
        raise UsageError("nas-prune needs a budget, not a number of layers; write --budget params=0.8", code="U540")
    return pareto(
        job.plan,
        objective=job.objective(job.data),
        budget=job.budget,
        legal=job.legal,
        grain=grain,
        trials=trials,
        population=population,
        seed=job.seed,
        stack=job.stack,
        progress=job.progress,
    )
