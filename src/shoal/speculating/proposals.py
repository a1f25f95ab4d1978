"""Where to look next among sets of a fixed size: at random, or by Bayesian optimisation of what was seen so far."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np

Subset = frozenset[int]
KAPPA = 2.5
"""Standard deviations by which hope counts beside what is expected."""
LENGTHS = (1.0, 2.0, 4.0, 8.0)
"""Length scales that are tried, in square roots of exchanges of one member for another."""
NOISE = 1e-3
POOL = 256
"""Random sets among which the most promising one is looked for."""


def random_subset(items: Sequence[int], size: int, draw: random.Random) -> Subset:
    """`size` of `items`, each set as likely as any other."""
    return frozenset(draw.sample(items, size))


def promising_subset(items: Sequence[int], size: int, seen: Mapping[Subset, float], draw: random.Random) -> Subset:
    """The set with the highest upper confidence bound m + 2.5 s among random ones and those one exchange away from the
    best seen. m and s are mean and standard deviation of a Gaussian process on the scores in `seen`, with a Matern
    kernel (nu = 5/2) of the distance between two sets, the square root of the number of exchanges, whose length is the
    likeliest of a few."""
    pool = {random_subset(items, size, draw) for _ in range(POOL)}
    best = max(seen, key=seen.__getitem__)
    out = [one for one in items if one not in best]
    for gone in sorted(best) if out else []:
        pool.add(best - {gone} | {draw.choice(out)})
    fresh = sorted(map(sorted, pool - seen.keys())) or sorted(map(sorted, pool))
    mean, deviation = _process(items, list(seen), np.array(list(seen.values())), [frozenset(one) for one in fresh])
    return frozenset(fresh[int(np.argmax(mean + KAPPA * deviation))])


def _process(
    items: Sequence[int], known: Sequence[Subset], scores: np.ndarray, asked: Sequence[Subset]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation at each of `asked`, [asked] each, given `scores` [known] at `known`."""
    points, wanted = _indicators(items, known), _indicators(items, asked)
    middle, spread = scores.mean(), scores.std() or 1.0
    values = (scores - middle) / spread

    def fitted(length: float) -> tuple[float, np.ndarray]:
        kernel = _matern(points, points, length) + NOISE * np.eye(len(points))
        lower = np.linalg.cholesky(kernel)
        white = np.linalg.solve(lower, values)
        return float(-white @ white / 2 - np.log(np.diag(lower)).sum()), lower

    length = max(LENGTHS, key=lambda one: fitted(one)[0])
    lower = fitted(length)[1]
    across = np.linalg.solve(lower, _matern(points, wanted, length))
    mean = across.T @ np.linalg.solve(lower, values)
    deviation = np.sqrt(np.clip(1 - (across**2).sum(0), 0, None))
    return middle + spread * mean, spread * deviation


def _indicators(items: Sequence[int], sets: Sequence[Subset]) -> np.ndarray:
    return np.array([[float(item in one) for item in items] for one in sets])


def _matern(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
    """(1 + r + r^2 / 3) exp(-r) with r = sqrt(5 d) / length, d half the number of places where two rows differ."""
    r = np.sqrt(5 * np.abs(a[:, None] - b[None]).sum(-1) / 2) / length
    kernel: np.ndarray = (1 + r + r**2 / 3) * np.exp(-r)
    return kernel
