"""Dynamic programming: the cheapest way through the layers when each interacts with the one before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from shoal.errors import PlanError, UsageError
from shoal.plan import Plan
from shoal.scores import Budget, Candidate, Found, Legal, Objective
from shoal.search._candidates import judge, unmet, value_of
from shoal.search._solve import chain
from shoal.search._table import KEEP, Space, Table, cheapest, measure, space

if TYPE_CHECKING:
    from shoal.evaluation import Progress


def dynamic_programming(
    plan: Plan,
    *,
    objective: Objective,
    budget: Budget,
    legal: Legal,
    maps: Mapping[int, str] | None = None,
    neighbours: bool = True,
    resolution: int = 1000,
    stack: str | None = None,
    progress: Progress | None = None,
) -> Found:
    """Choose for each layer keep, no attention, no mlp, none of it, or a map: the lowest sum over a chain of layers.

    F(i, c, s) = loss_ic + min over c' of [F(i-1, c', s - saved_ic) + pair(i, c, c')], s in steps of 1 / `resolution` of
    the dense cost, savings rounded down so that the budget holds. loss_ic is the measured rise of the objective when
    layer i alone becomes c; pair(i, c, c') what removing the same kind of piece from two neighbours costs beyond both
    (`neighbours=False`: nothing, which is a knapsack). The solution is measured end to end; the trace gives the
    additivity error. Exact, up to the rounding, for losses that interact between such neighbours only.

    Source: Bellman 1957; the knapsack over layers as in MIP- and DP-based depth pruning (for example Kim et al. 2023,
    arXiv 2301.12187).

    Raises U502, U542-U546.
    """
    if resolution < 10:
        raise UsageError(f"a resolution of {resolution} steps is too coarse; use resolution=10 or more", code="U502")
    room = space(plan, legal, stack=stack, maps=maps)
    pairs_at = _pairs(room) if neighbours else []
    total = sum(len(options) - 1 for options in room.options) + len(pairs_at)

    def report(done: int, before: int = 0) -> None:
        if progress is not None:
            progress(before + done, total, "single choices" if not before else "pairs of neighbours")

    table, here = measure(room, objective, budget, legal, room.whole(), report)
    singles = total - len(pairs_at)
    pairs = _interactions(room, table, here, objective, legal, pairs_at, lambda done: report(done, singles))
    chosen = chain(table, pairs, budget.to_save(plan), resolution)
    if chosen is None:
        raise unmet(budget, cheapest(room, table, legal))
    words = table.words(chosen)
    try:
        smaller = room.build(words)
    except PlanError:
        raise unmet(budget, plan) from None
    if not legal(smaller):
        raise UsageError(
            f"the best sum of choices, {smaller!s:.80}, is not legal as a whole; use milp, which takes the next one",
            code="U548",
        )
    if not budget.met(smaller):
        raise UsageError(
            f"the best sum of choices, {smaller!s:.80}, costs {budget.price_of(smaller):.3f} as a whole, more than the "
            f"{budget.share:g} asked for: its savings do not add up; use milp, which takes the next one",
            code="U548",
        )
    beyond = sum(pairs.get((i, chosen[i], chosen[i - 1]), 0.0) for i in range(1, len(chosen)))
    predicted = here + table.loss(chosen) + beyond
    value = value_of(objective, smaller)
    note = f"predicted {predicted:.4f}, measured {value:.4f}, additivity error {value - predicted:+.4f}"
    return Found(smaller, (Candidate(str(smaller), value, note),))


def _pairs(room: Space) -> list[tuple[int, str]]:
    """(place, word) where a layer and the one before it may both lose the same."""
    return [
        (place, word)
        for place in range(1, len(room.layers))
        for word in room.options[place]
        if word not in (KEEP, "map") and word in room.options[place - 1]
    ]


def _interactions(
    room: Space,
    table: Table,
    here: float,
    objective: Objective,
    legal: Legal,
    pairs: list[tuple[int, str]],
    report: Callable[[int], None],
) -> dict[tuple[int, int, int], float]:
    """What removing both costs beyond the two losses; infinite where it is illegal or has no value."""
    plans: dict[tuple[int, int, int], Plan | None] = {}
    for place, word in pairs:
        words = tuple(word if n in (place - 1, place) else KEEP for n in range(len(room.layers)))
        key = (place, room.options[place].index(word), room.options[place - 1].index(word))
        try:
            made = room.build(words)
        except PlanError:  # nothing would be left
            plans[key] = None
            continue
        plans[key] = made if legal(made) else None
    wanted = [made for made in plans.values() if made is not None]
    values = iter(judge(objective, wanted, exhaustive=True, report=report))
    found = {}
    for (place, option, other), plan in plans.items():
        value = None if plan is None else next(values)
        alone = table.losses[place][option] + table.losses[place - 1][other]
        known = value is not None and math.isfinite(value) and math.isfinite(alone)
        found[place, option, other] = (value or 0.0) - here - alone if known else math.inf
    return found | _borrowed(room, found)


def _borrowed(room: Space, found: dict[tuple[int, int, int], float]) -> dict[tuple[int, int, int], float]:
    """For a whole layer beside a part: what the two parts of that kind cost beyond both, as far as it was measured."""
    borrowed = {}
    for (place, option, other), extra in found.items():
        part = room.options[place][option]
        if part != "layer":
            if "layer" in room.options[place]:
                borrowed[place, room.options[place].index("layer"), other] = extra
            if "layer" in room.options[place - 1]:
                borrowed[place, option, room.options[place - 1].index("layer")] = extra
    return borrowed
