"""From recorded exits to one setting of thresholds for which a target is promised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.evaluation.exit_search import Setting, Target, losses, replay, search_path, thin
from shoal.evaluation.exits import Features
from shoal.evaluation.risk import BOUNDS, Bound, Losses, Tested, conformal, fixed_sequence

Live = Callable[[Target, Sequence[float]], tuple[Losses, float]]
"""Runs a setting on the test sequences: their losses in [0, 1], and the mean layers."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How promises are made."""

    delta: float
    guarantee: str = "fixed-sequence"
    bound: Bound = "hoeffding-bentkus"
    by: str = "probability"
    head: float = 0.0
    """Layers that a look through the head counts as, when thresholds are chosen."""
    points: int = 24


@dataclass(frozen=True, slots=True)
class ControlledRisk:
    """A target, the setting that was chosen for it, and what the test sequences say about it."""

    target: str
    promised: bool
    """False: no setting passed, so that nobody leaves and the target holds trivially."""
    thresholds: tuple[float, ...]
    """By exit; infinity where nobody leaves."""
    layers: float
    looks: float
    risk: float
    error: float
    """Standard error of the risk over sequences."""
    limit: float
    confidence: float | None
    """None for conformal risk control, which promises an average."""
    p_value: float | None
    tested: int
    """Settings that were tested until one failed."""
    sequences: int

    def sentence(self) -> str:
        """What is promised, in words."""
        kind, _, value = self.target.partition("=")
        what = f"an agreement of {value} or more" if kind == "agreement" else f"a loss at most {value} nats higher"
        if not self.promised:
            return f"{self.target}: no setting passed on {self.sequences} sequences; nobody leaves"
        how = "on average" if self.confidence is None else f"with confidence {self.confidence:g}"
        shown = f"{1 - self.risk:.4f} agree" if kind == "agreement" else f"risk {self.risk:.4f} of {self.limit:.4g}"
        return (
            f"{self.target}: {what} {how}, at {self.layers:.2f} layers per token ({shown} on the {self.sequences} "
            "sequences that tested it)"
        )


def control_risk(
    choose: Features,
    test: Features,
    target: Target,
    settings: Settings,
    *,
    live: Live | None = None,
    points: int | None = None,
) -> ControlledRisk:
    """Search settings on `choose`, then test them on `test` from the safest to the boldest.

    The two must be different sequences: settings that had been chosen on those that test them would look better than
    they are. With `live` the policy itself runs for every setting that is tested, at most `points` of them, beginning
    at the boldest one for which `choose` shows a third of the allowed risk or less.
    """
    path = thin(search_path(choose, target, settings.by, head=settings.head), settings.points)
    if live is not None:
        path = _near(path, target.limit, points or settings.points)
    seen: list[tuple[Losses, float | None]] = []

    def tried(number: int) -> Losses:
        if live is not None:
            seen.append(live(target, path[number].thresholds))
        else:
            left = replay(test, settings.by, path[number].thresholds).left
            seen.append((losses(test, target, left), None))
        return seen[-1][0]

    found = _tested(tried, len(path), target.limit, settings)
    if found.passed is None:
        shut = (float("inf"),) * len(test.layers)
        return _made(test, target, settings, shut, None, found, len(seen))
    thresholds = path[found.passed].thresholds
    return _made(test, target, settings, thresholds, seen[found.passed], found, len(seen))


def uncontrolled_risk(features: Features, target: Target, by: str, thresholds: Sequence[float]) -> ControlledRisk:
    """What recorded exits say about any setting; nothing is tested."""
    nothing = Tested(None, (), ())
    return _made(features, target, Settings(1.0, by=by), thresholds, None, nothing, 0)


def _tested(tried: Callable[[int], Losses], count: int, limit: float, settings: Settings) -> Tested:
    if settings.guarantee == "conformal":
        return conformal(tried, count, limit=limit)
    return fixed_sequence(tried, count, limit=limit, delta=settings.delta, p_value=BOUNDS[settings.bound])


def _near(path: Sequence[Setting], limit: float, points: int) -> list[Setting]:
    """The part of the path in which the boldest promise is to be expected, its safe end first."""
    start = max((at for at, one in enumerate(path) if one.risk <= limit / 3), default=0)
    stop = max((at for at, one in enumerate(path) if one.risk <= 1.2 * limit), default=start)
    return thin(path[start : stop + 1], points)


def _made(
    test: Features,
    target: Target,
    settings: Settings,
    thresholds: Sequence[float],
    seen: tuple[Losses, float | None] | None,
    found: Tested,
    tested: int,
) -> ControlledRisk:
    again = replay(test, settings.by, thresholds)
    lost = losses(test, target, again.left) if seen is None else seen[0]
    layers = again.layers if seen is None or seen[1] is None else seen[1]
    promised = found.passed is not None
    conformal_ = settings.guarantee == "conformal"
    return ControlledRisk(
        target.name,
        promised,
        tuple(thresholds),
        layers,
        again.looks,
        float(lost.mean()),
        float(lost.std(ddof=1) / np.sqrt(len(lost))) if len(lost) > 1 else 0.0,
        target.limit,
        None if conformal_ else 1 - settings.delta,
        found.p_values[found.passed] if found.passed is not None else None,
        tested,
        len(lost),
    )
