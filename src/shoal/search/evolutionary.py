"""Evolutionary: plans that do well have children."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.plan import Plan
from shoal.scores import Budget, Found, Legal, Objective, Scores
from shoal.search._candidates import Grain, goal
from shoal.search._keys import asked, breeder

if TYPE_CHECKING:
    from shoal.evaluation import Progress


def evolutionary(
    plan: Plan,
    *,
    objective: Objective,
    legal: Legal,
    drop: int | None = None,
    budget: Budget | None = None,
    scores: Scores | None = None,
    grain: Grain = "layer",
    trials: int = 128,
    population: int = 16,
    seed: int = 0,
    stack: str | None = None,
    progress: Progress | None = None,
) -> Found:
    """Breed `trials` plans by crossover and mutation of random keys, the better half of each population surviving.

    A plan is the order in which pieces go, a number per piece (random keys, Bean 1994), so that every child is legal
    and within the budget. `scores` give the first plan. The same seed breeds the same plans.

    Source: NSGA-II (Deb et al. 2002) with one objective, as optuna has it.

    Raises U502, U504, U505, U540-U547.
    """
    aim, sampler = goal(plan, drop, budget, grain, stack), breeder(population, seed)
    stage = "evolution"
    return asked(aim, legal, objective, sampler, trials=trials, scores=scores, progress=progress, stage=stage)
