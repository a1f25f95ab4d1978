"""Settings of thresholds that make a weighted sum of disagreement and cost small, chosen offline on recorded exits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoal.deciding.signals import WITHOUT_HEAD
from shoal.errors import UsageError
from shoal.evaluation.exit_search import NEVER, Setting, Target, losses, replay
from shoal.evaluation.exits import Features

AGREEMENT = Target("agreement", 0.5)
"""The kind of loss that is weighed: the share of tokens that the whole model would not have written."""


def trade_off(features: Features, by: str, weights: Sequence[float], *, head: float = 0.0) -> list[Setting]:
    """For each weight w in [0, 1] a setting of thresholds with a small w (1 - A) + (1 - w) C / C_whole.

    A is the agreement with the whole model, C the mean layers per token, plus `head` layers for each look through the
    head, C_whole those of the whole model. From "nobody leaves" on, always the one threshold is changed that takes most
    away, to the best value that it can have while the others stay, until none takes anything away. Each weight then
    takes the best of what was found for any, so that along growing weights the agreement never falls. w = 1: nobody
    leaves. w = 0 without `head`: all leave at the first exit.

    Source: Wang et al. 2024 (DyCE, arXiv 2403.01695): the sum, and the repeated best single change ("circular").

    How we differ: agreement stands for accuracy over the base's accuracy and layers for multiplications; the best value
    of one threshold is exact (a sum over sorted tokens), where the paper minimises over an interval; one kind of head
    and signal at all places; no conservative estimate of the accuracy, since `calibrate` reports sequences that were
    held out. Raises U700 for a weight outside of [0, 1].
    """
    require_tradeoffs(weights)
    found = [setting for weight in dict.fromkeys(weights) for setting in descent(features, by, weight, head=head)]
    return [min(found, key=lambda setting: weighed(features, setting, weight, head)) for weight in weights]


def require_tradeoffs(weights: Sequence[float]) -> None:
    """Raise U700 for a weight outside of [0, 1]."""
    for weight in weights:
        if not 0 <= weight <= 1:
            raise UsageError(
                f"a trade-off of {weight:g} is out of range: it is the weight of what differs from the whole model, "
                "from 0 to 1; give one between them, as 0.9",
                code="U700",
            )


def weighed(features: Features, setting: Setting, weight: float, head: float = 0.0) -> float:
    """w (1 - A) + (1 - w) C / C_whole of a setting."""
    return weight * setting.risk + (1 - weight) * setting.cost(head) / features.depths[-1]


def descent(features: Features, by: str, weight: float, *, head: float = 0.0) -> list[Setting]:
    """The settings on the way down for one weight, from "nobody leaves" on."""
    whole, exits = features.depths[-1], len(features.layers)
    depth = np.asarray(features.depths)[:, None, None] / whole
    left_at = weight * features.wrong + (1 - weight) * depth  # [e + 1, s, t], what a token costs that leaves there
    look = 0.0 if by in WITHOUT_HEAD else (1 - weight) * head / whole
    share = features.counted / features.counted.sum(1, keepdims=True) / len(features.counted)
    signal = features.signals[by]
    thresholds = [NEVER] * exits
    path = [_measured(features, by, thresholds)]
    while True:
        behind = _behind(signal, left_at, look, thresholds)
        there = features.counted.copy()
        best = (1e-12, 0, NEVER)
        for at, now in enumerate(thresholds):
            change = share * (left_at[at] - behind[at + 1])
            values, sums = _sorted_sums(signal[at][there], change[there])
            looks = look * float(share[there].sum())
            held = 0.0 if now == NEVER else looks + sums[values >= now][-1:].sum()
            gains = [(held, NEVER)]
            if len(sums):
                lowest = int(np.argmin(sums))
                gains.append((held - looks - sums[lowest], _between(values, lowest)))
            gain, threshold = max(gains)
            best = max(best, (gain, at, threshold))
            there &= ~(signal[at] >= now)
        if best[0] <= 1e-12:
            return path
        thresholds[best[1]] = best[2]
        path.append(_measured(features, by, thresholds))


def _behind(signal: np.ndarray, left_at: np.ndarray, look: float, thresholds: Sequence[float]) -> np.ndarray:
    """float [e + 1, s, t]: what a token costs that has come as far as each exit, and the end, without leaving."""
    found = left_at.copy()
    for at in range(len(thresholds) - 1, -1, -1):
        if thresholds[at] == NEVER:
            found[at] = found[at + 1]
        else:
            found[at] = look + np.where(signal[at] >= thresholds[at], left_at[at], found[at + 1])
    return found


def _sorted_sums(values: np.ndarray, changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each value from the highest on, and the sum of the changes of all tokens that have it or a higher one."""
    order = np.argsort(-values, kind="stable")
    ordered, sums = values[order], np.cumsum(changes[order])
    last = np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)]
    return ordered[last], sums[last]


def _between(values: np.ndarray, lowest: int) -> float:
    """A threshold that the value `lowest` reaches and the next one does not, half way where numbers allow."""
    reached, missed = values[lowest], values[min(lowest + 1, len(values) - 1)]
    middle = (reached + missed) / 2
    return float(middle if middle > missed else reached)


def _measured(features: Features, by: str, thresholds: Sequence[float]) -> Setting:
    found = replay(features, by, thresholds)
    risk = float(losses(features, AGREEMENT, found.left).mean())
    return Setting(tuple(thresholds), found.layers, found.looks, risk)
