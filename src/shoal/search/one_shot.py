"""One shot: remove the layers with the lowest scores, all at once."""

from __future__ import annotations

from typing import Literal

from shoal.errors import PlanError
from shoal.plan import Plan
from shoal.plan import drop as drop_pieces
from shoal.scores import Budget, Candidate, Found, Legal, Scores
from shoal.search._candidates import goal, named, pieces


def one_shot(
    plan: Plan,
    *,
    scores: Scores,
    legal: Legal,
    drop: int | None = None,
    budget: Budget | None = None,
    grain: Literal["layer", "attention", "mlp"] = "layer",
    stack: str | None = None,
) -> Found:
    """Remove the layers with the lowest scores that may go, `drop` of them or until the budget is met.

    The scores are not computed anew in between. `grain`: what goes of a layer; the scores must judge that. A layer
    whose removal would make the plan illegal, given what is gone already, is passed over (the trace says so) until
    another has gone. Layers that were not judged (NaN) stay.

    Source: the choice of ShortGPT (Men et al. 2024, arXiv 2403.03853) and of most published criteria.

    Raises U504 when fewer than `drop` may go, naming how many do, U543 when the budget cannot be met, U505 for scores
    of spans or of another model.
    """
    aim = goal(plan, drop, budget, grain, stack)
    there = {layer for layer, _ in pieces(plan, grain, stack)}
    scores.require(plan, (1,), stack)
    trace: list[Candidate] = []
    waiting = [layer for layer in scores.order() if layer in there]
    smaller, passed, found = plan, set[int](), 0
    while not aim.reached(smaller, found):
        for layer in waiting:
            candidate = _without(smaller, layer, grain, stack)
            if candidate is not None and legal(candidate):
                break
            if layer not in passed and candidate is not None:
                passed.add(layer)
                note = f"{named(layer, grain)} kept: not legal without it"
                trace.append(Candidate(str(candidate), scores.values[layer], note))
        else:
            raise aim.missed(smaller, found)
        waiting.remove(layer)
        smaller, found = candidate, found + 1
        trace.append(Candidate(str(smaller), scores.values[layer], f"{named(layer, grain)} removed"))
    return Found(smaller, tuple(trace), scores)


def _without(plan: Plan, layer: int, grain: Literal["layer", "attention", "mlp"], stack: str | None) -> Plan | None:
    try:
        return drop_pieces(plan, [layer], part=grain, stack=stack)
    except PlanError:  # nothing would be left
        return None
