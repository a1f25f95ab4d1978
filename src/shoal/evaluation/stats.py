"""Summaries of results: a weighted mean with its standard error, the bootstrap for others, a median with its range."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one thing, in the unit of the samples."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(median(samples), min(samples), max(samples), tuple(samples))


def ratio(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float | None]:
    """Sum of `sums` over sum of `counts`, and its standard error with the sequence as the unit of sampling.

    R = sum(s_i) / sum(n_i);  se(R)^2 = m / (m - 1) x sum((s_i - R n_i)^2) / (sum(n_i))^2  for m sequences with n_i > 0:
    the ratio estimator (Cochran, Sampling Techniques, 3rd ed., section 2.11), which allows for tokens of one sequence
    being alike. The error is None for a single sequence. `counts` must not all be zero.
    """
    pairs = [(s, n) for s, n in zip(sums, counts, strict=True) if n]
    total = sum(n for _, n in pairs)
    mean = math.fsum(s for s, _ in pairs) / total
    if len(pairs) < 2:
        return mean, None
    squares = math.fsum((s - mean * n) ** 2 for s, n in pairs)
    return mean, math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / total


def bootstrap(samples: Any, statistic: Callable[[Any], Any], *, draws: int = 1000, seed: int = 0) -> float | None:
    """The standard error of `statistic` by drawing sequences with replacement, `draws` times; None for one sequence.

    `samples`: numpy [sequences, figures], what each sequence adds to the sums that the statistic is made from.
    `statistic`: sums [..., figures] -> [...]. The same seed draws the same.

    Source: Efron and Tibshirani 1993, chapter 6.
    """
    import numpy as np

    count = len(samples)
    if count < 2:
        return None
    weights = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=draws)
    # row by row, so that figures which are equal stay equal to the last digit
    sums = sum(weights[:, row, None] * samples[row] for row in range(count))
    return float(np.std(statistic(sums), ddof=1))
