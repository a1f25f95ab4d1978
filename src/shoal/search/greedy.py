"""Greedy: remove the layer whose removal hurts least, then look again."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from shoal.plan import Plan
from shoal.scores import Budget, Candidate, Found, Legal, Objective
from shoal.search._candidates import Goal, Grain, Move, Stacks, best, goal, goal_of_several, judge, moves, value_of

if TYPE_CHECKING:
    from shoal.evaluation import Progress


def greedy(
    plan: Plan,
    *,
    objective: Objective,
    legal: Legal,
    drop: int | None = None,
    budget: Budget | None = None,
    grain: Grain = "layer",
    rank: Literal["loss", "saving"] = "loss",
    exhaustive: bool = False,
    stack: Stacks = None,
    progress: Progress | None = None,
) -> Found:
    """Remove the piece without which the objective is lowest, look at what is left, and go on until it is enough.

    `grain`: a piece is a layer, an attention, an mlp, or (sublayers) either of these; `drop` counts pieces. With
    `rank="saving"` the piece with the lowest rise of the objective per saved share of the budget goes, which matters
    where pieces differ in price. Ties go to the lower layer. The result for a smaller number is a prefix of that for a
    larger one. Candidates race where the objective can (see `docs/searching.md`); `exhaustive` evaluates every one in
    full, as SLEB's released code does: the sum over rounds of the pieces left. A candidate whose objective is NaN is
    never chosen. Several names for `stack`: `drop` layers go, each of whichever of these stacks it is best for.

    Source: SLEB (Song et al. 2024, arXiv 2402.09025); for parts FinerCut (arXiv 2405.18218) and BlockPruner (arXiv
    2406.10594).

    Raises U504, U540-U545.
    """
    if stack is None or isinstance(stack, str):
        aim = goal(plan, drop, budget, grain, stack)
    else:
        aim = goal_of_several(plan, drop or 0, stack)
    if rank == "saving" and budget is None:
        rank = "loss"
    trace: list[Candidate] = []
    while not aim.reached(plan, len(trace)):
        options = moves(plan, grain, legal, stack)
        report = _reporter(progress, aim, len(trace), len(options))
        if rank == "saving" and budget is not None:
            values = _per_saving(budget, objective, plan, options, exhaustive, report)
        else:
            values = judge(objective, [move.plan for move in options], exhaustive=exhaustive, report=report)
        chosen = best(values)
        if chosen is None:
            raise aim.missed(plan, len(trace), len(options))
        plan = options[chosen].plan
        trace.append(Candidate(str(plan), values[chosen] or 0.0, options[chosen].note))
    return Found(plan, tuple(trace))


def _per_saving(
    budget: Budget,
    objective: Objective,
    plan: Plan,
    options: list[Move],
    exhaustive: bool,
    report: Callable[[int], None] | None,
) -> list[float | None]:
    """The rise of the objective over what the removal saves; NaN for one that saves nothing, None for one that lost a
    race. Only pieces that save the same race each other: for these the lower objective is the lower rise per saving."""
    now, whole = value_of(objective, plan), budget.price_of(plan)
    alike: dict[float, list[int]] = {}
    for place, move in enumerate(options):
        alike.setdefault(round(whole - budget.price_of(move.plan), 9), []).append(place)
    values: list[float | None] = [math.nan] * len(options)
    done = 0
    for saving, places in alike.items():
        if saving > 0:
            told = None if report is None else partial(_onward, report, done)
            found = judge(objective, [options[place].plan for place in places], exhaustive=exhaustive, report=told)
            for place, value in zip(places, found, strict=True):
                values[place] = None if value is None else (value - now) / saving
        done += len(places)
    return values


def _onward(report: Callable[[int], None], before: int, done: int) -> None:
    report(before + done)


def _reporter(progress: Progress | None, aim: Goal, round_: int, size: int) -> Callable[[int], None] | None:
    """Tells `progress` of every candidate of all rounds, those to come estimated."""
    if progress is None:
        return None
    rounds = max(aim.removals(), round_ + 1)
    before = sum(size + round_ - k for k in range(round_))
    total = before + sum(size - k for k in range(rounds - round_))
    return lambda done: progress(before + done, total, f"round {round_ + 1} of {rounds}")
