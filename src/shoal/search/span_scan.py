"""Span scan: run every span of layers twice, once for each, and keep the whole map."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shoal.errors import UsageError
from shoal.plan import Plan
from shoal.scores import Candidate, Found, Legal, Objective
from shoal.search._candidates import best, judge, no_value, value_of

if TYPE_CHECKING:
    from shoal.evaluation import Progress

REMOVES = False


def span_scan(
    plan: Plan,
    *,
    objective: Objective,
    legal: Legal,
    first: int = 0,
    last: int | None = None,
    shortest: int = 1,
    longest: int | None = None,
    every: int = 1,
    stack: str | None = None,
    progress: Progress | None = None,
) -> Found:
    """Evaluate every plan in which the steps i..j run twice, 0..j and then i..end, and take the best.

    `first`, `last`: the places between which spans lie, in the order of the plan (of a whole model its layers).
    `shortest`, `longest`: how many steps a span has. `every`: only every so many starts and, from each, every so many
    ends, for a coarse map. The plan itself is evaluated too and stands first in the trace; the others follow by span,
    each with `twice`, from which the page draws the map. The best span is taken also where the plan as it was is
    better, which the trace tells. What is not legal is left out. Cost: one evaluation for each of n (n + 1) / 2 spans.

    Source: dnhkng 2026 (RYS, "LLM Neuroanatomy", dnhkng.github.io/posts/rys), the scan over (i, j).

    Raises U666 where no span lies, U504 when none of them is legal, U544-U546.
    """
    steps = plan.steps(stack)
    end = len(steps) - 1 if last is None else last
    most = len(steps) if longest is None else longest
    if not (0 <= first <= end < len(steps) and 1 <= shortest <= min(most, end - first + 1) and every >= 1):
        raise UsageError(
            f"no span of {shortest} to {most} steps lies between {first} and {end}, every {every}, in a plan of "
            f"{len(steps)}; give first and last from 0 to {len(steps) - 1}, shortest up to longest, every 1 or more",
            code="U666",
        )
    spans: dict[tuple[int, int], Plan] = {}
    for i in range(first, end + 1, every):
        for j in range(i + shortest - 1, min(end, i + most - 1) + 1, every):
            repeated = plan.with_steps((*steps[: j + 1], *steps[i:]), stack)
            if legal(repeated):
                spans[i, j] = repeated
    if not spans:
        raise UsageError(
            "no span may run twice: no such plan is legal; allow plans that only run live, or scan other layers",
            code="U504",
        )
    report = None if progress is None else lambda done: progress(done + 1, len(spans) + 1, "spans twice")
    trace = [Candidate(str(plan), value_of(objective, plan), "as it was")]
    # one after the other and in full: a race would leave holes in the map
    values = judge(objective, list(spans.values()), exhaustive=True, report=report)
    chosen = best(values)
    if chosen is None:
        raise no_value(len(spans))
    for ((i, j), repeated), value in zip(spans.items(), values, strict=True):
        score = math.nan if value is None else value
        trace.append(Candidate(str(repeated), score, f"{_named(i, j)} twice", (i, j)))
    return Found(list(spans.values())[chosen], tuple(trace))


def _named(i: int, j: int) -> str:
    return f"step {i}" if i == j else f"steps {i} to {j}"
