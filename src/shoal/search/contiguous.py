"""Contiguous span: remove the span of neighbouring layers with the lowest score."""

from __future__ import annotations

import math

from shoal.errors import UsageError
from shoal.plan import Plan
from shoal.plan import drop as drop_layers
from shoal.scores import Candidate, Found, Legal, Scores, removable


def contiguous(
    plan: Plan, *, scores: Scores, drop: int, legal: Legal, stay: int = 0, stack: str | None = None
) -> Found:
    """Remove the `drop` neighbouring layers with the lowest score over a span; ties go to the lower layers.

    `scores` judges spans of exactly `drop` layers (by their first layer), or single layers, whose sum then judges a
    span. With `stay` a span is judged with so many layers more at its beginning, which stay. A span that was not judged
    (NaN) or does not run whole stays.

    Source: the choice of Gromov et al. 2024 (arXiv 2403.17887) and of LLM-Streamline (Chen et al. 2024, arXiv
    2403.19135).

    Raises U505 for scores of other spans or of another model, U504 when no span may go.
    """
    there = set(removable(plan, drop, stack))
    scores.require(plan, (1, drop + stay), stack)
    trace: list[Candidate] = []
    for value, first in sorted(_spans(scores, drop + stay)):
        if not there.issuperset(range(first, first + stay + drop)):
            continue
        span = range(first + stay, first + stay + drop)
        smaller = drop_layers(plan, span, stack=stack)
        if legal(smaller):
            trace.append(Candidate(str(smaller), value, f"layers {span[0]} to {span[-1]} removed"))
            return Found(smaller, tuple(trace), scores)
        trace.append(Candidate(str(smaller), value, f"layers {span[0]} to {span[-1]} kept: not legal without them"))
    raise UsageError(
        f"no {drop} neighbouring layers may go together; remove another number of layers, or name them", code="U504"
    )


def _spans(scores: Scores, drop: int) -> list[tuple[float, int]]:
    """(score, first layer) of each span that was judged."""
    values = scores.values
    if scores.span != drop:
        values = tuple(sum(values[first : first + drop]) for first in range(len(values) - drop + 1))
    return [(value, first) for first, value in enumerate(values) if not math.isnan(value)]
