"""Greedy: remove the layer whose removal hurts least, then look again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.errors import UsageError
from shoal.plan import Plan, drop as drop_layers
from shoal.scores import Candidate, Found, Legal, Objective

if TYPE_CHECKING:
    from shoal.evaluate import Progress


def greedy(
    plan: Plan,
    *,
    objective: Objective,
    drop: int,
    legal: Legal,
    stack: str | None = None,
    progress: Progress | None = None,
) -> Found:
    """In each of `drop` rounds, evaluate the plan without each remaining layer and keep the best; ties go to the lower layer.

    Every candidate is evaluated in full on the plan as it is by then: sum over rounds of the layers left. The result for
    a smaller budget is a prefix of the result for a larger one. Raises U504 when no layer may go any more.
    """
    trace: list[Candidate] = []
    left = len(set(plan.layers(stack)))
    total, done = sum(left - k for k in range(drop)), 0
    for round_ in range(drop):
        best: tuple[float, int, Plan] | None = None
        for layer in sorted(set(plan.layers(stack))):
            done += 1
            if len(set(plan.layers(stack))) == 1:
                break
            smaller = drop_layers(plan, [layer], stack=stack)
            if not legal(smaller):
                continue
            score = objective(smaller)
            if best is None or score < best[0]:
                best = (score, layer, smaller)
            if progress is not None:
                progress(done, total, f"round {round_ + 1} of {drop}")
        if best is None:
            raise UsageError(f"only {round_} layers may go, not {drop}; ask for --drop {round_}", code="U504")
        plan = best[2]
        trace.append(Candidate(str(plan), best[0], f"layer {best[1]} removed"))
    return Found(plan, tuple(trace))
