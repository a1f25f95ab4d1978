"""One shot: remove the layers with the lowest scores, all at once."""

from __future__ import annotations

from shoal.plan import Plan
from shoal.plan import drop as drop_layers
from shoal.scores import Candidate, Found, Legal, Scores, removable, too_few


def one_shot(plan: Plan, *, scores: Scores, drop: int, legal: Legal, stack: str | None = None) -> Found:
    """Remove the `drop` layers with the lowest scores that may go; the scores are not computed anew in between.

    A layer whose removal would make the plan illegal, given what is gone already, is passed over (the trace says so)
    until another has gone. Layers that were not judged (NaN) stay. Raises U504 when fewer than `drop` layers may go,
    naming how many do, U505 for scores of spans or of another model.
    """
    there = removable(plan, drop, stack)
    scores.require(plan, (1,), stack)
    trace: list[Candidate] = []
    waiting = [layer for layer in scores.order() if layer in there]
    smaller, passed = plan, set[int]()
    for found in range(drop):
        for layer in waiting:
            candidate = drop_layers(smaller, [layer], stack=stack)
            if legal(candidate):
                break
            if layer not in passed:
                passed.add(layer)
                trace.append(
                    Candidate(str(candidate), scores.values[layer], f"layer {layer} kept: not legal without it")
                )
        else:
            raise too_few(found, drop)
        waiting.remove(layer)
        smaller = candidate
        trace.append(Candidate(str(smaller), scores.values[layer], f"layer {layer} removed"))
    return Found(smaller, tuple(trace), scores)
