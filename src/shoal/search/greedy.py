"""Greedy: remove the layer whose removal hurts least, then look again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from shoal.plan import Plan
from shoal.plan import drop as drop_layers
from shoal.scores import Candidate, Found, Legal, Objective, removable, too_few

if TYPE_CHECKING:
    from shoal.evaluation import Progress


def greedy(
    plan: Plan,
    *,
    objective: Objective,
    drop: int,
    legal: Legal,
    stack: str | None = None,
    progress: Progress | None = None,
) -> Found:
    """In each of `drop` rounds, evaluate the plan without each layer that is left, and remove the one missed least.

    Ties go to the lower layer. Every candidate is evaluated in full on the plan as it is by then: the sum over rounds
    of the layers left. The result for a smaller budget is a prefix of the result for a larger one. A candidate whose
    objective is NaN is never chosen. Raises U504 when no layer may go any more.
    """
    left = len(removable(plan, drop, stack))
    trace: list[Candidate] = []
    total, done = sum(left - k for k in range(drop)), 0
    for round_ in range(drop):
        best: tuple[float, int, Plan] | None = None
        for layer in sorted(set(plan.layers(stack))):
            smaller = drop_layers(plan, [layer], stack=stack)
            score = objective(smaller) if legal(smaller) else math.nan
            if not math.isnan(score) and (best is None or score < best[0]):
                best = (score, layer, smaller)
            done += 1
            if progress is not None:
                progress(done, total, f"round {round_ + 1} of {drop}")
        if best is None:
            raise too_few(round_, drop)
        plan = best[2]
        trace.append(Candidate(str(plan), best[0], f"layer {best[1]} removed"))
    return Found(plan, tuple(trace))
