"""What measures and searches hand on: a score per layer, a plan with the candidates that were looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from shoal.plan import Plan

Legal = Callable[[Plan], bool]
"""Says whether a plan may be chosen: legal for the model, and expressible if it is to be written."""

Objective = Callable[[Plan], float]
"""What a search makes small, in nats per token unless it says otherwise."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How little each layer (or each span of `span` layers that starts there) matters: the lowest goes first."""

    measure: str
    stack: str
    unit: str
    values: tuple[float, ...]
    """By base layer; NaN where the layer could not be judged."""
    errors: tuple[float | None, ...]
    """Standard error over calibration sequences; None for a single sequence."""
    sequences: int
    tokens: int
    data: str
    span: int = 1
    notes: tuple[str, ...] = ()

    def order(self) -> tuple[int, ...]:
        """Layers (or starts of spans) from the least important on; those that could not be judged are left out."""
        judged = [i for i, value in enumerate(self.values) if not math.isnan(value)]
        return tuple(sorted(judged, key=lambda i: (self.values[i], i)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; NaN becomes None, which JSON can say."""
        values = [None if math.isnan(value) else value for value in self.values]
        return {**asdict(self), "values": values, "order": list(self.order())}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One plan that a search looked at."""

    notation: str
    score: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search or a method answers."""

    plan: Plan
    trace: tuple[Candidate, ...] = ()
    scores: Scores | None = None
