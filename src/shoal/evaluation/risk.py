"""How sure a mean loss can be said to lie below a limit, from a sample of sequences.

A sequence is the unit: its loss is the mean over its own tokens, in [0, 1]. Tokens of one sequence depend on each
other, so counting them one by one would promise far too much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shoal.errors import DataError, UsageError

Bound = Literal["hoeffding-bentkus", "betting"]
Losses = np.ndarray
"""float64 [sequences], each the mean loss of one sequence, in [0, 1]."""
PValue = Callable[[Losses, float], float]


def hoeffding_bentkus(losses: Losses, limit: float) -> float:
    """P-value for "the expected loss is above `limit`"; small when the sample speaks against it.

    min(exp(-n h(min(R, a), a)), e P(Bin(n, a) <= ceil(n R))), R the mean of n losses, a the limit, h the relative
    entropy of two coins. The bound knows nothing of the variance, so it is cautious where sequences are alike.

    Source: Bates et al. 2021 (arXiv 2101.02703), as Schuster et al. 2022 (CALM, arXiv 2207.07061) use it.
    """
    from scipy.stats import binom

    n, mean = len(losses), float(np.mean(losses))
    if mean >= limit:
        return 1.0
    hoeffding = math.exp(-n * _relative_entropy(mean, limit))
    # a mean such as 3/10 may come out a bit above, and the next integer would be taken
    bentkus = math.e * float(binom.cdf(math.ceil(n * mean - 1e-9), n, limit))
    return min(1.0, hoeffding, bentkus)


def betting(losses: Losses, limit: float) -> float:
    """P-value as `hoeffding_bentkus`, from a wager that grows when losses stay below `limit`.

    K_t = prod_{i<=t} (1 - b_i (L_i - a)), b_i from the losses before i, p = 1 / max_t K_t (Ville). Tighter where
    sequences are alike. Losses must be in the order in which they were drawn.

    Source: Waudby-Smith & Ramdas 2020 (arXiv 2010.09686), the bound of Angelopoulos et al. 2021 (Learn then Test, arXiv
    2110.01052), appendix.
    """
    n = len(losses)
    seen = np.arange(1, n + 1)
    means = (0.5 + np.cumsum(losses)) / (seen + 1)
    spread = (0.25 + np.cumsum((losses - means) ** 2)) / (seen + 1)
    before = np.concatenate([[0.25], spread[:-1]])
    wager = np.minimum(np.sqrt(2 * math.log(1 / 0.1) / (n * before)), 0.999 / (1 - limit))
    wealth = np.cumsum(np.log1p(-wager * (losses - limit)))
    return float(min(1.0, math.exp(-wealth.max())))


BOUNDS: dict[Bound, PValue] = {"hoeffding-bentkus": hoeffding_bentkus, "betting": betting}


@dataclass(frozen=True, slots=True)
class Tested:
    """What the sequences said about the settings that were tested, in order."""

    passed: int | None
    """The last setting that was certified; None when the first one failed already."""
    p_values: tuple[float, ...]
    """Of each tested setting; the last one belongs to the failure, if there was one. Conformal: bounds of the risk."""
    means: tuple[float, ...]
    """The mean loss of each tested setting."""


def fixed_sequence(
    losses: Callable[[int], Losses], settings: int, *, limit: float, delta: float, p_value: PValue = hoeffding_bentkus
) -> Tested:
    """Learn then Test by fixed-sequence testing: go from the safest setting to the boldest and stop at the first whose
    p-value is above `delta`. With probability 1 - `delta` the expected loss of every certified setting is at most
    `limit`, however the losses depend on the setting. The order must have been fixed without these sequences.

    `losses(i)` is called once for each setting that is reached.

    Source: Angelopoulos et al. 2021 (arXiv 2110.01052).
    """
    values: list[float] = []
    means: list[float] = []
    for setting in range(settings):
        found = losses(setting)
        values.append(p_value(found, limit))
        means.append(float(np.mean(found)))
        if values[-1] > delta:
            return Tested(setting - 1 if setting else None, tuple(values), tuple(means))
    return Tested(settings - 1 if settings else None, tuple(values), tuple(means))


def conformal(losses: Callable[[int], Losses], settings: int, *, limit: float) -> Tested:
    """Conformal risk control: the boldest setting with (n R + 1) / (n + 1) <= `limit`, R the mean over the n sequences
    of the largest loss that each had at this setting or a safer one (which makes the losses monotone, as the theorem
    asks). The expected loss of the *next* sequence is then at most `limit`, on average over samples: no confidence
    stands beside it.

    Source: Angelopoulos et al. 2022 (arXiv 2208.02814).
    """
    worst: Losses | None = None
    bounds: list[float] = []
    means: list[float] = []
    for setting in range(settings):
        found = losses(setting)
        worst = found if worst is None else np.maximum(worst, found)
        bounds.append((float(worst.sum()) + 1) / (len(worst) + 1))
        means.append(float(np.mean(found)))
        if bounds[-1] > limit:
            return Tested(setting - 1 if setting else None, tuple(bounds), tuple(means))
    return Tested(settings - 1 if settings else None, tuple(bounds), tuple(means))


def sequences_needed(limit: float, delta: float | None) -> int:
    """The fewest sequences that can certify anything, when none has any loss; `delta` None: conformal."""
    if delta is None:
        return math.ceil(1 / limit - 1 - 1e-9)
    return math.ceil(math.log(delta) / math.log1p(-limit) - 1e-9)


def require_confidence(confidence: float) -> float:
    """1 - `confidence`. Raises U600 for a confidence outside [0.5, 1)."""
    if not 0.5 <= confidence < 1:
        raise UsageError(
            f"confidence={confidence:g} cannot be promised by any number of sequences, or means nothing; give a number "
            "from 0.5 to below 1, as 0.9",
            code="U600",
        )
    return 1 - confidence


def require_sequences(there: int, limit: float, delta: float | None, *, parts: int = 2) -> None:
    """Raise D470 when `there` sequences for the test cannot certify `limit`; all in all `parts` times as many are
    read, since the settings are chosen on others than those that test them."""
    needed = sequences_needed(limit, delta)
    if there < needed:
        raise DataError(
            f"{there} sequences are left for the test, and even without a single loss a risk of {limit:.3g} needs "
            f"{needed}; give --limit {parts * needed} or more, a lower target or a lower confidence",
            code="D470",
        )


def _relative_entropy(one: float, other: float) -> float:
    """Of a coin with probability `one` to one with `other` > `one`, in nats."""
    first = one * math.log(one / other) if one > 0 else 0.0
    return first + (1 - one) * math.log((1 - one) / (1 - other))


def sequence_means(values: np.ndarray, counted: np.ndarray) -> Losses:
    """The mean of `values` [sequences, tokens] over the counted tokens of each sequence."""
    found: Losses = (values * counted).sum(1) / counted.sum(1)
    return found
