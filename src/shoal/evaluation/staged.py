"""Answers in stages: whoever is sure enough ends there, the others go on. Thresholds from what was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.errors import UsageError

NEVER = float("inf")
"""The threshold of a stage at which nobody is asked."""
_GAIN = 1e-12
"""What a change must take away, so that rounding is no gain."""


def require_tradeoffs(weights: Sequence[float]) -> None:
    """Raise U700 for a weight outside of [0, 1]."""
    for weight in weights:
        if not 0 <= weight <= 1:
            raise UsageError(
                f"a trade-off of {weight:g} is out of range: it is the weight of wrong answers, from 0 to 1, and the "
                "cost has the rest; give one between them, as 0.9",
                code="U700",
            )


@dataclass(frozen=True, eq=False)
class Stages:
    """What each stage would have answered. Axes: stages [k], and those who ask, in any shape [...]."""

    signal: np.ndarray
    """float [k, ...]: how sure each stage but the last one is."""
    wrong: np.ndarray
    """bool [k + 1, ...]."""
    cost: np.ndarray
    """float [k + 1]: what whoever ends at a stage has cost, as a share of some whole."""
    looks: np.ndarray
    """float [k]: what it costs besides to ask a stage, of all who come as far; nothing where its threshold is NEVER."""
    share: np.ndarray
    """float [...]: how much each counts, 1 in all."""

    def measured(self, thresholds: Sequence[float]) -> tuple[float, float]:
        """(share of wrong answers, mean cost): each ends at the first stage whose signal reaches its threshold."""
        error, cost, there = 0.0, 0.0, self.share.copy()
        for signal, wrong, ends, look, threshold in zip(
            self.signal, self.wrong, self.cost, self.looks, thresholds, strict=False
        ):
            if threshold != NEVER:
                left = there * (signal >= threshold)
                error += float((left * wrong).sum())
                cost += float(left.sum() * ends + there.sum() * look)
                there = there - left
        return error + float((there * self.wrong[-1]).sum()), cost + float(there.sum() * self.cost[-1])

    def weighed(self, thresholds: Sequence[float], weight: float) -> float:
        """w error + (1 - w) cost."""
        error, cost = self.measured(thresholds)
        return weight * error + (1 - weight) * cost

    def descent(self, weight: float) -> list[tuple[float, ...]]:
        """From "nobody ends early" on, always the one threshold is changed that takes most of the weighed sum away, to
        the best value that it can have while the others stay, until none takes anything away."""
        count = len(self.signal)
        cost = self.cost.reshape(-1, *(1 for _ in self.share.shape))
        ends, looks = weight * self.wrong + (1 - weight) * cost, (1 - weight) * self.looks
        path = [(NEVER,) * count]
        while True:
            now, behind, there = path[-1], self._behind(path[-1], ends, looks), self.share > 0
            best = (_GAIN, 0, NEVER)
            for at in range(count):
                change = self.share * (ends[at] - behind[at + 1])
                values, sums = _sorted_sums(self.signal[at][there], change[there])
                asked = float(looks[at] * self.share[there].sum())
                held = 0.0 if now[at] == NEVER else asked + float(sums[values >= now[at]][-1:].sum())
                gains = [(held, NEVER)]
                if len(sums):
                    lowest = int(np.argmin(sums))
                    gains.append((held - asked - float(sums[lowest]), _between(values, lowest)))
                gain, threshold = max(gains)
                best = max(best, (gain, at, threshold))
                there &= ~(self.signal[at] >= now[at])
            if best[0] <= _GAIN:
                return path
            path.append((*now[: best[1]], best[2], *now[best[1] + 1 :]))

    def best(self, weights: Sequence[float]) -> list[tuple[float, ...]]:
        """For each weight the best thresholds that were found for any, so that along growing weights the error never
        grows. Raises U700 for a weight outside of [0, 1]."""
        require_tradeoffs(weights)
        found = [thresholds for weight in dict.fromkeys(weights) for thresholds in self.descent(weight)]
        return [min(found, key=lambda thresholds: self.weighed(thresholds, weight)) for weight in weights]

    def _behind(self, thresholds: Sequence[float], ends: np.ndarray, looks: np.ndarray) -> np.ndarray:
        """float [k + 1, ...]: the weighed sum of whoever has come as far as each stage, from there on."""
        found = ends.copy()
        for at in range(len(thresholds) - 1, -1, -1):
            left = np.where(self.signal[at] >= thresholds[at], ends[at], found[at + 1])
            found[at] = found[at + 1] if thresholds[at] == NEVER else looks[at] + left
        return found


def _sorted_sums(values: np.ndarray, changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each value from the highest on, and the sum of the changes of all that have it or a higher one."""
    order = np.argsort(-values, kind="stable")
    ordered, sums = values[order], np.cumsum(changes[order])
    last = np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)]
    return ordered[last], sums[last]


def _between(values: np.ndarray, lowest: int) -> float:
    """A threshold that the value `lowest` reaches and the next one does not, half way where numbers allow."""
    reached, missed = values[lowest], values[min(lowest + 1, len(values) - 1)]
    middle = (reached + missed) / 2
    return float(middle if middle > missed else reached)
