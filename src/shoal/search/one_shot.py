"""One shot: remove the layers with the lowest scores, all at once."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.plan import Plan, drop as drop_layers
from shoal.scores import Candidate, Found, Legal, Scores


def one_shot(plan: Plan, *, scores: Scores, drop: int, legal: Legal, stack: str | None = None) -> Found:
    """Remove the `drop` layers with the lowest scores that may go; the scores are not computed anew in between.

    A layer whose removal would make the plan illegal, given what is gone already, is passed over and the trace says so.
    Raises U504 when fewer than `drop` layers may go, naming how many do.
    """
    trace: list[Candidate] = []
    gone: list[int] = []
    for layer in scores.order():
        if len(gone) == drop:
            break
        if len(gone) + 1 == len(set(plan.layers(stack))):
            break
        smaller = drop_layers(plan, [*gone, layer], stack=stack)
        if legal(smaller):
            gone.append(layer)
            trace.append(Candidate(str(smaller), scores.values[layer], f"layer {layer} removed"))
        else:
            trace.append(Candidate(str(plan), scores.values[layer], f"layer {layer} kept: without it the plan is not legal"))
    if len(gone) < drop:
        raise UsageError(f"only {len(gone)} layers may go, not {drop}; ask for --drop {len(gone)}", code="U504")
    return Found(drop_layers(plan, gone, stack=stack), tuple(trace), scores)
