"""Random search: the best of many plans drawn evenly, what every cleverer search must beat."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from shoal.plan import Plan
from shoal.scores import Budget, Found, Legal, Objective
from shoal.search._candidates import Grain, goal, judge, named
from shoal.search._keys import decoder, ranked, require_trials

if TYPE_CHECKING:
    from shoal.evaluation import Progress


def random_search(
    plan: Plan,
    *,
    objective: Objective,
    legal: Legal,
    drop: int | None = None,
    budget: Budget | None = None,
    grain: Grain = "layer",
    trials: int = 64,
    exhaustive: bool = False,
    seed: int = 0,
    stack: str | None = None,
    progress: Progress | None = None,
) -> Found:
    """Draw `trials` plans with `seed`, removing pieces in a random order until it is enough, and take the best.

    Plans drawn twice are evaluated once. They race where the objective can, unless `exhaustive`; the trace holds those
    that were evaluated in full, the best first.

    Source: Bergstra and Bengio 2012.

    Raises U502, U504, U540-U546.
    """
    require_trials(trials)
    own = decoder(goal(plan, drop, budget, grain, stack), legal)
    draw = random.Random(seed)
    drawn = (own({named(*piece): draw.random() for piece in own.pieces}) for _ in range(trials))
    different = list({str(made): made for made in drawn}.values())
    values = judge(
        objective,
        different,
        exhaustive=exhaustive,
        report=None if progress is None else lambda done: progress(done, len(different), "random plans"),
    )
    return ranked([(value, made) for value, made in zip(values, different, strict=True) if value is not None])
