"""Thresholds by a weighted sum: against brute force, at the ends, along the weights, and with a planted answer."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from shoal.errors import UsageError
from shoal.evaluation.exit_search import Target, losses, replay
from shoal.evaluation.exit_tradeoff import recorded_stages, trade_off
from shoal.evaluation.exits import Features
from shoal.evaluation.staged import NEVER

WEIGHTS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)
AGREEMENT = Target("agreement", 0.5)
TRIED = (NEVER, *np.arange(9) / 8)


def recorded(exits: int, *, sequences: int = 4, tokens: int = 8, seed: int = 0) -> Features:
    """Exits of which later ones are right more often; signals that take few values, so that many are equal; padding."""
    rng = np.random.default_rng(seed)
    shape = (exits, sequences, tokens)
    signal = rng.integers(0, 9, shape).astype(np.float32) / 8
    right = rng.random(shape) < 0.2 + 0.5 * signal + 0.3 * np.arange(exits)[:, None, None] / exits
    choice = np.where(np.concatenate([right, np.ones((1, *shape[1:]), bool)]), 1, 2).astype(np.int32)
    counted = rng.random(shape[1:]) < 0.8
    counted[:, 0] = True
    signals = dict.fromkeys(("probability", "saturation"), signal)
    depths = (*(2.0 * (exit_ + 1) for exit_ in range(exits)), 2.0 * exits + 2)
    return Features(tuple(range(exits)), depths, signals, choice, np.zeros(choice.shape, np.float32), counted, 1, {})


def by_hand(features: Features, by: str, thresholds: tuple[float, ...], head: float) -> tuple[float, float]:
    """Disagreement and cost as `calibrate` counts them: by sequence."""
    found = replay(features, by, thresholds)
    error = float(losses(features, AGREEMENT, found.left).mean())
    return error, (found.layers + head * found.looks) / features.depths[-1]


def weighed(features: Features, by: str, thresholds: tuple[float, ...], weight: float, head: float) -> float:
    error, cost = by_hand(features, by, thresholds, head)
    return weight * error + (1 - weight) * cost


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("by", "head"), [("probability", 0.0), ("probability", 1.5), ("saturation", 1.5)])
def test_one_exit_is_brute_force(weight: float, by: str, head: float) -> None:
    for seed in range(5):
        features = recorded(1, seed=seed)
        best = min(weighed(features, by, (value,), weight, head) for value in TRIED)
        found = trade_off(features, by, (weight,), head=head)[0]
        assert weighed(features, by, found, weight, head) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("head", [0.0, 0.4])
def test_each_step_costs_less_and_at_the_end_no_single_threshold_helps(weight: float, head: float) -> None:
    for seed in range(4):
        features = recorded(4, seed=seed)
        path = recorded_stages(features, "probability", head=head).descent(weight)
        costs = [weighed(features, "probability", one, weight, head) for one in path]
        assert all(later < earlier for earlier, later in pairwise(costs))
        for at in range(4):
            for value in TRIED:
                other = (*path[-1][:at], value, *path[-1][at + 1 :])
                assert weighed(features, "probability", other, weight, head) >= costs[-1] - 1e-12


def test_stages_count_as_replayed_exits_do() -> None:
    features = recorded(3)
    stages = recorded_stages(features, "probability", head=0.7)
    for thresholds in ((NEVER,) * 3, (0.5, NEVER, 0.25), (0.75, 0.5, 0.125), (0.0, 0.0, 0.0)):
        assert stages.measured(thresholds) == pytest.approx(by_hand(features, "probability", thresholds, 0.7))


def test_all_weight_on_what_differs_leaves_nowhere_and_none_leaves_at_once() -> None:
    features = recorded(3)
    dear, cheap = trade_off(features, "probability", (1.0, 0.0))
    assert dear == (NEVER,) * 3
    assert by_hand(features, "probability", cheap, 0)[1] == pytest.approx(features.depths[0] / features.depths[-1])


def test_a_head_that_costs_more_than_it_saves_is_not_asked() -> None:
    features = recorded(3)
    assert trade_off(features, "probability", (0.3,), head=100.0) == [(NEVER,) * 3]
    assert trade_off(features, "saturation", (0.3,), head=100.0) != [(NEVER,) * 3]


@pytest.mark.parametrize("seed", range(4))
def test_along_growing_weights_the_agreement_grows_and_so_does_the_cost(seed: int) -> None:
    features = recorded(4, seed=seed)
    found = trade_off(features, "probability", np.linspace(0, 1, 21).tolist(), head=0.2)
    errors, costs = zip(*(by_hand(features, "probability", one, 0.2) for one in found), strict=True)
    assert list(errors) == sorted(errors, reverse=True)
    assert list(costs) == sorted(costs)
    assert len(set(errors)) > 3, "a front of several settings"


def test_planted_tokens_leave_where_they_are_right() -> None:
    """Signals of 1 where the exit is right; the first exit is right for a half, the second for a half of the rest."""
    right = np.zeros((2, 2, 8), bool)
    right[0, :, ::2] = right[1, :, ::4] = right[1, :, 1::4] = True
    choice = np.where(np.concatenate([right, np.ones((1, 2, 8), bool)]), 1, 2).astype(np.int32)
    signals = {"probability": right.astype(np.float32)}
    nothing = np.zeros(choice.shape, np.float32)
    features = Features((0, 1), (1.0, 2.0, 4.0), signals, choice, nothing, np.ones((2, 8), bool), 1, {})
    found = trade_off(features, "probability", (0.9,))[0]
    assert by_hand(features, "probability", found, 0) == (0, pytest.approx((1 + 1 + 2 + 4) / 4 / 4))
    assert all(0 < threshold < 1 for threshold in found)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(UsageError, match=r"U700: a trade-off of .* is out of range"):
        trade_off(recorded(1), "probability", (0.5, weight))
