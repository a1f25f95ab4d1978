"""What SWIFT proposes: sets of one size, at random, and now and then where a Gaussian process promises most."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any, cast

import numpy as np
import pytest

from shoal.errors import UsageError
from shoal.models.inspect import inspect
from shoal.speculating.drafts.swift import _Swift, swift
from shoal.speculating.proposals import NOISE, _indicators, _process, promising_subset, random_subset

from .families import tiny_of

ITEMS = list(range(12))
GOOD = frozenset({1, 4, 7, 10})


def matchness(own: frozenset[int]) -> float:
    """A planted score: how many of the right parts are skipped."""
    return len(own & GOOD) / 4


class Context:
    """A text that grows by `window` tokens each time it is looked at."""

    def __init__(self, swift: _Swift) -> None:
        self.swift, self.length, self.asked = swift, 0, list[frozenset[int]]()

    def snapshot(self) -> Any:
        return "cache"

    def agreement(self, steps: Any, before: Any, since: int) -> float:
        whole = ("layer", "attention"), ("layer", "mlp")
        parts = {2 * run.layer + n for run in steps for n, names in enumerate(whole) if run.part in names}
        skipped = frozenset(set(range(2, 2 * self.swift.spec.stack("decoder").depth - 2)) - parts)
        self.asked.append(skipped)
        return len(skipped & {3, 4, 7, 10}) / 8


def searched(monkeypatch: pytest.MonkeyPatch | None = None, **options: Any) -> tuple[_Swift, Context, list[int]]:
    """A whole search on six layers, and which of its proposals were Bayesian (from 1)."""
    chooser = cast(_Swift, swift(spec=inspect(tiny_of("llama", 6)), window=2, enough=1.0, **options))
    chooser.begin(chooser.spec)
    context, bayesian = Context(chooser), list[int]()
    if monkeypatch is not None:
        monkeypatch.setattr(
            "shoal.speculating.drafts.swift.promising_subset",
            lambda *given: bayesian.append(chooser.tried) or promising_subset(*given),
        )
    for _ in range(200):
        context.length += chooser.window
        chooser.again(cast(Any, context))
    return chooser, context, bayesian


def test_every_set_skips_as_many_parts_and_each_25th_is_bayesian(monkeypatch: pytest.MonkeyPatch) -> None:
    chooser, context, bayesian = searched(monkeypatch, fraction=0.45, tries=60)
    assert {len(own) for own in context.asked} == {int(2 * (6 - 2) * 0.45)} == {3}
    assert bayesian == [25, 50] and chooser.tried == 60
    assert chooser.score == max(chooser.seen.values())
    assert searched(fraction=0.45, tries=60)[1].asked == context.asked, "the same seed proposes the same"
    assert searched(fraction=0.45, tries=60, seed=1)[1].asked != context.asked
    monkeypatch.undo()
    assert searched(monkeypatch, fraction=0.45, tries=8, every=1)[2] == list(range(1, 9))


def test_local_proposals_draw_no_sets_and_random_ones_are_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = searched(fraction=0.4, tries=40, every=99)[1].asked
    assert min(len(one & two) for one, two in itertools.pairwise(drawn)) == 0
    monkeypatch.setattr("shoal.speculating.drafts.swift.random_subset", None)
    local = searched(fraction=0.4, tries=40, propose="local")[1].asked
    assert len(local[1] - local[0]) <= 1


@pytest.mark.parametrize(("fraction", "parts"), [(0.3, 2), (0.45, 3), (0.5, 4), (0.74, 5), (0.99, 7), (0.01, 1)])
def test_the_number_of_parts_is_rounded_down(fraction: float, parts: int) -> None:
    chooser = cast(_Swift, swift(spec=inspect(tiny_of("llama", 6)), fraction=fraction))
    chooser.begin(chooser.spec)
    assert len(chooser.best) == parts == max(1, int(8 * fraction))


def test_a_random_set_is_each_as_likely() -> None:
    draw = random.Random(0)
    found = [random_subset(range(4), 2, draw) for _ in range(3000)]
    counts = [found.count(frozenset(pair)) for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
    assert sum(counts) == 3000 and min(counts) > 400  # 500 each, with a standard deviation of 20


def test_the_process_is_the_textbooks() -> None:
    """Mean and deviation by the inverse of the covariance, in numpy."""
    draw = random.Random(3)
    known = [random_subset(ITEMS, 4, draw) for _ in range(6)]
    asked = [*known[:2], random_subset(ITEMS, 4, draw), GOOD]
    scores = np.array([matchness(one) for one in known])
    mean, deviation = _process(ITEMS, known, scores, asked)

    def kernel(a: frozenset[int], b: frozenset[int], length: float) -> float:
        r = math.sqrt(5 * len(a - b)) / length
        return (1 + r + r * r / 3) * math.exp(-r)

    values, best = (scores - scores.mean()) / scores.std(), (-math.inf, 0.0)
    for length in (1.0, 2.0, 4.0, 8.0):
        k = np.array([[kernel(a, b, length) for b in known] for a in known]) + NOISE * np.eye(6)
        best = max(best, (-values @ np.linalg.inv(k) @ values / 2 - np.linalg.slogdet(k)[1] / 2, length))
    k = np.linalg.inv(np.array([[kernel(a, b, best[1]) for b in known] for a in known]) + NOISE * np.eye(6))
    across = np.array([[kernel(a, b, best[1]) for b in asked] for a in known])
    assert mean == pytest.approx(scores.mean() + scores.std() * (across.T @ k @ values), abs=1e-9)
    spread = scores.std() * np.sqrt(np.clip(1 - np.einsum("ij,ik,kj->j", across, k, across), 0, None))
    assert deviation == pytest.approx(spread, abs=1e-7)
    assert np.allclose(mean[:2], scores[:2], atol=0.05) and deviation[:2].max() < deviation[3] / 5
    assert _indicators(ITEMS, [GOOD]).sum() == 4


def test_bayesian_proposals_find_the_planted_set_sooner_than_random_ones() -> None:
    def best_after(tries: int, bayesian: bool, seed: int) -> float:
        draw = random.Random(seed)
        seen = {one: matchness(one) for one in (random_subset(ITEMS, 4, draw) for _ in range(8))}
        for _ in range(tries):
            one = promising_subset(ITEMS, 4, seen, draw) if bayesian else random_subset(ITEMS, 4, draw)
            seen[one] = matchness(one)
        return max(seen.values())

    rounds = [(best_after(8, True, seed), best_after(8, False, seed)) for seed in range(6)]
    assert sum(one for one, _ in rounds) > sum(other for _, other in rounds) + 0.5
    assert sum(one == 1.0 for one, _ in rounds) >= 4


def test_a_search_without_bayesian_steps_is_refused() -> None:
    with pytest.raises(UsageError, match=r"U614.*each 0-th"):
        swift(spec=inspect(tiny_of("llama", 6)), every=0)
