"""Contiguous span: remove the span of neighbouring layers with the lowest score."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.plan import Plan, drop as drop_layers
from shoal.scores import Candidate, Found, Legal, Scores


def contiguous(plan: Plan, *, scores: Scores, drop: int, legal: Legal, stack: str | None = None) -> Found:
    """Remove the `drop` neighbouring layers with the lowest score over a span.

    `scores` judges spans of exactly `drop` layers (by their first layer), or single layers, whose sum then judges a
    span. Raises U505 for scores of another span, U504 when no span may go.
    """
    if scores.span not in (1, drop):
        raise UsageError(f"these scores judge spans of {scores.span} layers, not {drop}; measure again", code="U505")
    depth = plan.depth(stack)
    starts = range(depth - drop + 1) if drop < depth else range(0)
    values = [
        scores.values[first] if scores.span == drop else sum(scores.values[first : first + drop]) for first in starts
    ]
    trace: list[Candidate] = []
    for first in sorted(starts, key=lambda start: (values[start], start)):
        smaller = drop_layers(plan, range(first, first + drop), stack=stack)
        if legal(smaller):
            trace.append(Candidate(str(smaller), values[first], f"layers {first} to {first + drop - 1} removed"))
            return Found(smaller, tuple(trace), scores)
        trace.append(Candidate(str(smaller), values[first], "not legal"))
    raise UsageError(f"no span of {drop} layers may go; ask for a smaller --drop", code="U504")
