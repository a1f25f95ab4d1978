"""Integer programme: one choice per layer, the lowest sum of measured losses within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from shoal.errors import UsageError
from shoal.plan import Plan
from shoal.scores import Budget, Candidate, Found, Legal, Objective
from shoal.search._candidates import no_value, unmet, value_of
from shoal.search._solve import solve
from shoal.search._table import Choices, Space, Table, cheapest, measure, space

if TYPE_CHECKING:
    from shoal.evaluation import Progress

CUTS = 200
"""Solutions that may turn out illegal or too dear before the programme gives up."""


def milp(
    plan: Plan,
    *,
    objective: Objective,
    budget: Budget,
    legal: Legal,
    maps: Mapping[int, str] | None = None,
    rounds: int = 2,
    tries: int = 4,
    reach: int = 4,
    stack: str | None = None,
    progress: Progress | None = None,
) -> Found:
    """Choose for each layer keep, no attention, no mlp, none of it, or a map, so that the sum of losses is lowest.

    minimise sum_ic loss_ic x_ic  subject to  sum_c x_ic = 1,  sum_ic saved_ic x_ic >= price(plan) - share,  x in {0, 1}
    loss_ic is the measured rise of the objective when layer i alone becomes c; saved_ic what that saves of `budget`.
    Layers do interact, so the `tries` best solutions are measured end to end, and each further round measures every
    single change *from the best solution so far* and solves again for at most `reach` layers changed. The best measured
    plan within the budget is returned; the trace gives for each solution what was predicted, what was measured, and the
    additivity error (measured - predicted). `maps`: layer -> name of fitted weights that may stand for it.

    Source: HiGHS through `scipy.optimize.milp`; the additive form as in Puzzle (Bercovich et al. 2024, arXiv
    2411.19146).

    How we differ: no replacement blocks are trained, and additivity is corrected. Raises U502, U542-U546.
    """
    if min(rounds, tries, reach) < 1:
        raise UsageError(
            f"rounds={rounds}, tries={tries} and reach={reach} leave nothing to do; use 1 or more of each", code="U502"
        )
    room = space(plan, legal, stack=stack, maps=maps)
    around, best, measured = room.whole(), math.inf, dict[Choices, Candidate]()
    for number in range(rounds):
        table, here = measure(room, objective, budget, legal, around, _reporter(progress, room, number, rounds))
        centre, before = around, len(measured)
        for _ in range(tries):
            chosen = _solution(room, table, budget, legal, centre, reach if number else None, measured)
            if chosen is None:
                break
            words = table.words(chosen)
            smaller, predicted = room.build(words), here + table.loss(chosen)
            value = value_of(objective, smaller)
            note = f"round {number + 1}: predicted {predicted:.4f}, measured {value:.4f}"
            error = f"additivity error {value - predicted:+.4f}"
            measured[words] = Candidate(str(smaller), value, f"{note}, {error}")
            if value < best:
                best, around = value, words
        if not measured:
            raise unmet(budget, cheapest(room, table, legal))
        if around == centre or len(measured) == before:
            break
    if math.isinf(best):
        raise no_value(len(measured))
    trace = sorted(measured.values(), key=lambda c: (math.isnan(c.score), c.score))
    return Found(room.build(around), tuple(trace))


def _solution(
    room: Space,
    table: Table,
    budget: Budget,
    legal: Legal,
    around: Choices,
    reach: int | None,
    measured: Collection[Choices],
) -> tuple[int, ...] | None:
    """The best legal solution that meets the budget and was not measured yet; what is illegal as a whole is cut off and
    the next one taken."""
    need = budget.to_save(room.build(around))
    now = [options.index(word) for options, word in zip(room.options, around, strict=True)]
    refused = [
        tuple(options.index(word) for options, word in zip(room.options, words, strict=True)) for words in measured
    ]
    for _ in range(CUTS):
        chosen = solve(table, need, around=now, reach=reach, without=refused)
        if chosen is None:
            return None
        words = table.words(chosen)
        if set(words) <= {"layer"}:
            refused.append(chosen)  # nothing would be left
            continue
        made = room.build(words)
        if legal(made) and budget.met(made):
            return chosen
        refused.append(chosen)
    return None


def _reporter(progress: Progress | None, room: Space, number: int, rounds: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    size = sum(len(options) - 1 for options in room.options)
    return lambda done: progress(number * size + done, rounds * size, f"single choices, round {number + 1} of {rounds}")
