"""Bayesian: each plan is tried where a model of the plans before it promises most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.plan import Plan
from shoal.scores import Budget, Found, Legal, Objective, Scores
from shoal.search._candidates import Grain, goal
from shoal.search._keys import asked, samplers

if TYPE_CHECKING:
    from shoal.evaluation import Progress


def bayesian(
    plan: Plan,
    *,
    objective: Objective,
    legal: Legal,
    drop: int | None = None,
    budget: Budget | None = None,
    scores: Scores | None = None,
    grain: Grain = "layer",
    trials: int = 128,
    first: int = 16,
    seed: int = 0,
    stack: str | None = None,
    progress: Progress | None = None,
) -> Found:
    """Try `trials` plans, the `first` ones at random, the others where good plans are denser than bad ones.

    A plan is the order in which pieces go, a number per piece (random keys, Bean 1994), so that every proposal is legal
    and within the budget. `scores` give the first plan. The same seed tries the same plans.

    Source: the tree-structured Parzen estimator (Bergstra et al. 2011), as optuna has it.

    Raises U502, U504, U505, U540-U547.
    """
    aim = goal(plan, drop, budget, grain, stack)
    sampler = samplers().TPESampler(n_startup_trials=max(0, first), seed=seed)
    stage = "Bayesian search"
    return asked(aim, legal, objective, sampler, trials=trials, scores=scores, progress=progress, stage=stage)
