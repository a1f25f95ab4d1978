"""Makes scores of sums by layer and sequence: every measure that averages over tokens ends with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.data import Data
from shoal.evaluation.stats import ratio
from shoal.scores import Scores


def mean_scores(
    measure: str,
    unit: str,
    sums: Sequence[Sequence[float]],
    counts: Sequence[float],
    data: Data | str,
    *,
    stack: str,
    tokens: int | None = None,
    span: int = 1,
    notes: tuple[str, ...] = (),
    detail: Mapping[str, Any] | None = None,
    removal: bool = True,
) -> Scores:
    """Scores whose values are sum(sums[i]) / sum(counts), with the standard error of that ratio over sequences.

    `sums`: [layers][sequences], NaN for a layer that could not be judged. `counts`: [sequences], what was averaged;
    `tokens` where that is not the number of tokens. `data`: what was looked at, or words for it.
    """
    means = [(math.nan, None) if any(map(math.isnan, own)) else ratio(own, counts) for own in sums]
    return Scores(
        measure=measure,
        stack=stack,
        unit=unit,
        values=tuple(mean for mean, _ in means),
        errors=tuple(error for _, error in means),
        sequences=len(counts),
        tokens=int(sum(counts)) if tokens is None else tokens,
        data=data if isinstance(data, str) else data.info.describe(),
        span=span,
        notes=notes,
        detail=detail or {},
        samples=tuple(tuple(map(float, own)) for own in sums),
        counts=tuple(map(float, counts)),
        removal=removal,
    )
