"""Settings of thresholds from the safest to the boldest, chosen offline on recorded exits, and what each one costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.deciding.signals import WITHOUT_HEAD
from shoal.errors import UsageError
from shoal.evaluation.exits import Features
from shoal.evaluation.risk import Losses, sequence_means
from shoal.evaluation.staged import NEVER

GRID_SIZE = 20
"""Thresholds that are tried at each exit: quantiles of the signal there."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is promised: `agreement` at least `value`, or a `loss` that rises by at most `value` nats."""

    kind: str
    value: float
    cap: float = 1.0
    """A sequence whose loss rises by more nats than this counts with `cap`, one whose loss falls with 0."""

    @property
    def name(self) -> str:
        return f"{self.kind}={self.value:g}"

    @property
    def limit(self) -> float:
        """The risk in [0, 1] that corresponds."""
        return 1 - self.value if self.kind == "agreement" else self.value / self.cap

    def scaled(self, means: Losses) -> Losses:
        """Losses in [0, 1] of sequences whose mean loss (share of other tokens, or nats) is given."""
        return means if self.kind == "agreement" else np.clip(means, 0, self.cap) / self.cap

    def shown(self, risk: float) -> float:
        """A risk in the target's own unit."""
        return 1 - risk if self.kind == "agreement" else risk * self.cap


def parse_target(text: str, cap: float = 1.0) -> Target:
    """agreement=0.95 or loss=0.1 (nats). Raises U601 for another kind, U602 for a value out of range."""
    kind, _, value = (piece.strip() for piece in text.partition("="))
    if kind not in ("agreement", "loss"):
        raise UsageError(f"{text!r:.60} is no target; write agreement=0.95, or loss=0.1 in nats", code="U601")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if kind == "agreement" and not 0 < number < 1:
        raise UsageError(
            f"{text!r:.60} is out of range: an agreement is a share above 0 and below 1, as agreement=0.95 (no sample "
            "can promise 1)",
            code="U602",
        )
    if kind == "loss" and not 0 < number < cap:
        raise UsageError(
            f"{text!r:.60} is out of range: a rise of the loss is above 0 nats and below the cap of {cap:g}; give a "
            "smaller one, or a larger --cap",
            code="U602",
        )
    return Target(kind, number, cap)


@dataclass(frozen=True, slots=True, eq=False)
class Replay:
    """Recorded exits replayed under one setting of thresholds."""

    left: np.ndarray
    """int [s, t]: the number of the exit at which each token leaves; the number of exits where it never does."""
    layers: float
    """Mean layers per token, over sequences."""
    looks: float
    """Mean number of exits per token at which the head ran to find out; 0 for signals that need none."""


def replay(features: Features, by: str, thresholds: Sequence[float]) -> Replay:
    """Who would leave where: at the first exit whose signal reaches its threshold, as the policy does it."""
    signal = features.signals[by]
    exits = len(features.layers)
    left = np.full(signal.shape[1:], exits, np.int64)
    looks = np.zeros(signal.shape[1:])
    for at, threshold in enumerate(thresholds):
        if threshold == NEVER:
            continue
        there = left == exits
        looks += there
        left[there & (signal[at] >= threshold)] = at
    depth = np.asarray(features.depths)[left]
    seen = 0.0 if by in WITHOUT_HEAD else float(sequence_means(looks, features.counted).mean())
    return Replay(left, float(sequence_means(depth, features.counted).mean()), seen)


def losses(features: Features, target: Target, left: np.ndarray) -> Losses:
    """The loss of each sequence in [0, 1] when tokens leave at `left` [s, t]."""
    values = features.wrong if target.kind == "agreement" else features.rise
    return target.scaled(sequence_means(np.take_along_axis(values, left[None], 0)[0], features.counted))


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table: a threshold for each exit, and what it does on the sequences that chose it."""

    thresholds: tuple[float, ...]
    layers: float
    looks: float
    risk: float

    def cost(self, head: float) -> float:
        """Layers and looks, a look being worth `head` layers."""
        return self.layers + head * self.looks


def search_path(
    features: Features,
    target: Target,
    by: str,
    *,
    head: float = 0.0,
    ceiling: float | None = None,
    grid_size: int = GRID_SIZE,
) -> list[Setting]:
    """From "nobody leaves" on, always the lower threshold at one exit that saves most for the risk it adds, until the
    risk passes `ceiling` (default: three times the target's).

    Cost: mean layers, plus `head` layers for each look through the head. Thresholds are quantiles of the signal at
    their exit; an exit that is still shut may open at any fourth one.

    Source: a record searched offline, one threshold for each exit: DyCE (Wang et al. 2024, arXiv 2403.01695). How we
    differ: DyCE minimises a weighted sum by coordinate descent for each weight (`trade_off` does); this greedy path is
    nested, so that its order can be tested from the safe end.
    """
    wide = max(3 * target.limit, 0.02) if ceiling is None else ceiling
    grids = [_grid(values[features.counted], grid_size) for values in features.signals[by]]
    at = [0] * len(grids)
    path = [_measured(features, target, by, grids, at)]
    while True:
        now = path[-1]
        best: tuple[float, list[int], Setting] | None = None
        for exit_, grid in enumerate(grids):
            steps = [at[exit_] + 1] if at[exit_] else range(1, len(grid), 4)
            for step in steps:
                if step >= len(grid):
                    continue
                place = [*at[:exit_], step, *at[exit_ + 1 :]]
                found = _measured(features, target, by, grids, place)
                saved = now.cost(head) - found.cost(head)
                worth = saved / max(found.risk - now.risk, 1e-6)
                if saved > 0 and (best is None or worth > best[0]):
                    best = worth, place, found
        if best is None or best[2].risk > wide:
            return path
        at = best[1]
        path.append(best[2])


def one_threshold(features: Features, target: Target, by: str, *, grid_size: int = GRID_SIZE) -> list[Setting]:
    """The same threshold at all exits (CALM without its decay), from the safest down: what the search must beat."""
    shared = _grid(features.signals[by][:, features.counted].ravel(), grid_size)
    grids = [shared] * len(features.layers)
    return [_measured(features, target, by, grids, [step] * len(grids)) for step in range(len(shared))]


def thin(path: Sequence[Setting], points: int) -> list[Setting]:
    """At most `points` settings of the path, its ends among them, evenly spread over what they cost."""
    if len(path) <= points:
        return list(path)
    wanted = np.linspace(path[0].layers, path[-1].layers, points)
    places = {min(range(len(path)), key=lambda i: abs(path[i].layers - layers)) for layers in wanted}
    return [path[i] for i in sorted(places | {0, len(path) - 1})]


def _measured(features: Features, target: Target, by: str, grids: list[np.ndarray], at: list[int]) -> Setting:
    thresholds = tuple(float(grid[step]) for grid, step in zip(grids, at, strict=True))
    found = replay(features, by, thresholds)
    return Setting(thresholds, found.layers, found.looks, float(losses(features, target, found.left).mean()))


def _grid(values: np.ndarray, grid_size: int) -> np.ndarray:
    """Never, and then thresholds that let more and more tokens leave."""
    quantiles = np.quantile(values, np.linspace(1, 0, grid_size + 1), method="nearest")
    return np.concatenate([[NEVER], np.unique(quantiles)[::-1]])
