"""Which of many plans has the lowest loss, without evaluating all of them on all the data."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal.evaluation.plan_loss import BatchLoss, PlanLoss, mean_of
from shoal.evaluation.stats import ratio
from shoal.plan import Plan

LEVEL = 0.001
"""The chance that one comparison drops a plan which all the data would have put first."""
SAMPLES = 16
"""Blocks, from two sequences or more, before anything is dropped: with fewer a t bound on skewed losses is too bold."""
GROWTH = 1.3
"""Each stage sees so many times the batches of the one before it."""


@dataclass
class _Runner:
    place: int
    plan: Plan
    parts: list[BatchLoss] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return mean_of(self.parts)


def race(
    loss: PlanLoss,
    plans: Sequence[Plan],
    *,
    keep: int = 1,
    level: float = LEVEL,
    seed: int = 0,
    report: Callable[[int], None] | None = None,
    dropped: Callable[[Plan, int], None] | None = None,
) -> list[float | None]:
    """The loss of each plan on all the data, or None for one that was dropped on the way.

    All plans see the same batches, in an order drawn with `seed`. After each stage a plan goes when it is worse than
    the `keep`-th best so far by a paired, one-sided t bound at `level`: the samples are differences over blocks of 8
    neighbouring tokens (sequences would be too few), the variance has the finite-population factor 1 - seen / all,
    because what counts is the rank on this data, not on all text. A plan with a loss that is not finite goes at once.

    Source: racing algorithms, Maron and Moore 1994; F-race, Birattari et al. 2002, tests blocks in the same way.
    `report` is called with the number of plans that are decided, `dropped` with each plan that goes and the batches it
    saw.
    """
    numbers = list(range(len(loss.batches)))
    random.Random(seed).shuffle(numbers)
    runners = [_Runner(place, plan) for place, plan in enumerate(plans)]
    values: list[float | None] = [None] * len(runners)
    forks = loss.forks(plans)
    sequences = [len(loss.batches[number][0]) for number in numbers]
    seen = 0
    while seen < len(numbers) and runners:
        stage = numbers[seen : max(seen + 1, math.ceil(seen * GROWTH))]
        for runner, parts in zip(runners, loss.parts([one.plan for one in runners], stage, among=forks), strict=True):
            runner.parts += parts
        seen += len(stage)
        for runner in [one for one in runners if not math.isfinite(one.mean)]:
            values[runner.place] = runner.mean
            runners.remove(runner)
        share = sum(sequences[:seen]) / sum(sequences)
        for runner in _worse(runners, keep, level, share):
            runners.remove(runner)
            if dropped is not None:
                dropped(runner.plan, seen)
        if report is not None and seen < len(numbers):
            report(len(plans) - len(runners))
    in_order = sorted(range(len(numbers)), key=numbers.__getitem__)
    for runner in runners:
        values[runner.place] = mean_of(runner.parts[i] for i in in_order)
    if report is not None:
        report(len(plans))
    return values


def _worse(runners: list[_Runner], keep: int, level: float, share: float) -> list[_Runner]:
    """Those that the bound puts behind the `keep`-th best, when a share of all sequences was seen."""
    if len(runners) <= keep or share >= 1:
        return []
    best = sorted(runners, key=lambda one: one.mean)[keep - 1]
    return [one for one in runners if one.mean > best.mean and _behind(one.parts, best.parts, level, share)]


def _behind(own: list[BatchLoss], other: list[BatchLoss], level: float, share: float) -> bool:
    from scipy.special import stdtrit

    sizes = [n for part in own for n in part.sizes]
    own_sums, other_sums = ([b for part in parts for b in part.blocks] for parts in (own, other))
    mean, error = ratio([a - b for a, b in zip(own_sums, other_sums, strict=True)], sizes)
    if error is None or len(sizes) < SAMPLES or sum(len(part.sums) for part in own) < 2:
        return False
    return mean > float(stdtrit(len(sizes) - 1, 1 - level)) * error * math.sqrt(1 - share)
