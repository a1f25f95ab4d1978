"""Beam: greedy removal that keeps several plans alive."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from shoal.errors import UsageError
from shoal.plan import Plan
from shoal.scores import Budget, Candidate, Found, Legal, Objective
from shoal.search._candidates import Goal, Grain, goal, judge, moves

if TYPE_CHECKING:
    from shoal.evaluation import Progress


def beam(
    plan: Plan,
    *,
    objective: Objective,
    legal: Legal,
    drop: int | None = None,
    budget: Budget | None = None,
    grain: Grain = "layer",
    width: int = 4,
    exhaustive: bool = False,
    stack: str | None = None,
    progress: Progress | None = None,
) -> Found:
    """In each round, remove every piece from each of the `width` best plans so far, and keep the `width` best results.

    `width=1` is `greedy`. Plans that two ways lead to are evaluated once; ties go to the plan found first. A plan that
    is within the budget leaves the beam and is kept; the search ends when all have. Candidates race where the objective
    can, for the best `width` places, unless `exhaustive`. Cost: at most `width` times that of greedy.

    Source: beam search (Lowerre 1976), over what `greedy` removes.

    Raises U502 for a width below 1, U504, U540-U545.
    """
    if width < 1:
        raise UsageError(f"a beam of width {width} is empty; use width=1 or more", code="U502")
    aim = goal(plan, drop, budget, grain, stack)
    alive: list[tuple[Plan, float, str]] = [(plan, math.nan, "")]
    done: list[tuple[Plan, float, str]] = []
    removed = 0
    while alive:
        options = {str(move.plan): move for old, _, _ in alive for move in moves(old, grain, legal, stack)}
        plans = [move.plan for move in options.values()]
        values = judge(
            objective, plans, keep=width, exhaustive=exhaustive, report=_reporter(progress, aim, removed, len(plans))
        )
        judged = [
            (move.plan, value, move.note)
            for move, value in zip(options.values(), values, strict=True)
            if value is not None and not math.isnan(value)
        ]
        if not judged:
            if done:
                break
            raise aim.missed(alive[0][0], removed, len(plans))
        removed += 1
        judged = sorted(judged, key=lambda one: one[1])[:width]
        done += [one for one in judged if aim.reached(one[0], removed)]
        alive = [one for one in judged if not aim.reached(one[0], removed)]
    ranked = sorted(done, key=lambda one: one[1])
    return Found(ranked[0][0], tuple(Candidate(str(made), value, note) for made, value, note in ranked))


def _reporter(progress: Progress | None, aim: Goal, round_: int, size: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    rounds = max(aim.removals(), round_ + 1)
    return lambda done: progress(round_ * size + done, rounds * size, f"round {round_ + 1} of {rounds}")
