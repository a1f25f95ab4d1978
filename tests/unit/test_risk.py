"""The bounds hold where the truth is known, and the same check catches bounds that promise too much."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from shoal.api.risk_control import Settings, control_risk
from shoal.errors import DataError, UsageError
from shoal.evaluation.exit_search import Target, losses, parse_target, replay, search_path
from shoal.evaluation.exits import Features
from shoal.evaluation.risk import (
    BOUNDS,
    betting,
    conformal,
    fixed_sequence,
    hoeffding_bentkus,
    require_confidence,
    require_sequences,
    sequences_needed,
)

LIMIT, DELTA, TIMES, TOKENS = 0.1, 0.1, 200, 20
TRUE = np.array([0.0, 0.02, 0.05, 0.08, 0.105, 0.14, 0.2])
"""The expected loss of each setting."""


def _draw(rng: np.random.Generator, sequences: int = 80) -> np.ndarray:
    """Losses [settings, sequences] whose tokens stand and fall together, which is the hardest case in [0, 1]."""
    return (rng.random(sequences) < TRUE[:, None]).astype(float)


def _violations(p_value: Callable[[np.ndarray, float], float]) -> int:
    """How often, in TIMES resamplings, a setting is certified whose true risk is above the limit."""
    rng = np.random.default_rng(5)
    broken = 0
    for _ in range(TIMES):
        sample = _draw(rng)
        found = fixed_sequence(sample.__getitem__, len(TRUE), limit=LIMIT, delta=DELTA, p_value=p_value)
        broken += found.passed is not None and TRUE[found.passed] > LIMIT
    return broken


ALLOWED = TIMES * DELTA + 3 * (TIMES * DELTA * (1 - DELTA)) ** 0.5
"""Three standard deviations above what the confidence allows."""


@pytest.mark.parametrize("bound", sorted(BOUNDS))
def test_the_promise_holds_over_resamplings(bound: str) -> None:
    assert _violations(BOUNDS[bound]) <= ALLOWED  # type: ignore[index]


def test_the_check_catches_bounds_that_promise_too_much() -> None:
    """The mean alone; and tokens of one sequence counted as if they were independent."""
    assert _violations(lambda sample, limit: 0.0 if sample.mean() <= limit else 1.0) > ALLOWED
    assert _violations(lambda sample, limit: hoeffding_bentkus(np.repeat(sample, TOKENS), limit)) > ALLOWED


def test_conformal_risk_control_holds_on_average_and_the_plain_mean_does_not() -> None:
    rng = np.random.default_rng(7)
    fine = np.linspace(0, 0.5, 101)
    safe, plain = [], []
    for _ in range(TIMES * 2):
        draw = rng.random(20)
        sample = (draw < fine[:, None]).astype(float)
        passed = conformal(sample.__getitem__, len(fine), limit=LIMIT).passed
        safe.append(fine[passed] if passed is not None else 0.0)
        plain.append(fine[np.flatnonzero(sample.mean(1) <= LIMIT)[-1]])
    error = np.std(safe) / np.sqrt(len(safe))
    assert np.mean(safe) <= LIMIT + 3 * error
    assert np.mean(plain) > LIMIT + 3 * error


@pytest.mark.parametrize("bound", sorted(BOUNDS))
def test_a_bound_is_monotone_and_not_idle(bound: str) -> None:
    """More sequences without a loss speak louder; losses above the limit say nothing."""
    p_value = BOUNDS[bound]  # type: ignore[index]
    values = [p_value(np.zeros(n), LIMIT) for n in (5, 20, 80)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.01
    assert p_value(np.full(50, 0.3), LIMIT) == 1.0


def test_betting_gains_where_sequences_are_alike() -> None:
    alike = np.random.default_rng(0).normal(0.06, 0.01, 60).clip(0, 1)
    assert betting(alike, LIMIT) < hoeffding_bentkus(alike, LIMIT)


def test_as_many_sequences_as_are_said_to_be_needed_are_needed() -> None:
    for limit, delta in ((0.05, 0.1), (0.1, 0.05), (0.01, 0.1)):
        needed = sequences_needed(limit, delta)
        assert hoeffding_bentkus(np.zeros(needed), limit) <= delta < hoeffding_bentkus(np.zeros(needed - 1), limit)
    needed = sequences_needed(0.05, None)
    assert conformal(lambda _: np.zeros(needed), 1, limit=0.05).passed == 0
    assert conformal(lambda _: np.zeros(needed - 1), 1, limit=0.05).passed is None
    with pytest.raises(DataError, match=r"D470: 20 sequences.* needs 45; give --limit 90"):
        require_sequences(20, 0.05, 0.1)


@pytest.mark.parametrize("value", [0.4, 1.0, 1.2, float("nan")])
def test_confidence_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="U600"):
        require_confidence(value)


@pytest.mark.parametrize(
    ("text", "code"),
    [("agreement=1", "U602"), ("agreement=0", "U602"), ("agreement=x", "U602"), ("agreement", "U602"),
     ("loss=2", "U602"), ("loss=nan", "U602"), ("speed=2", "U601"), ("", "U601")],
)  # fmt: skip
def test_targets_out_of_range_are_refused(text: str, code: str) -> None:
    with pytest.raises(UsageError, match=code):
        parse_target(text)


def features(sequences: int, seed: int = 0, exits: int = 3, tokens: int = 12) -> Features:
    """Exits that are right with probability signal ** 0.5 or so, some sequences harder than others."""
    rng = np.random.default_rng(seed)
    shape = (exits, sequences, tokens)
    hard = rng.random((1, sequences, 1)) * 0.5
    signal = (rng.random(shape) * (1 - hard)).astype(np.float32)
    right = rng.random(shape) < 0.55 + 0.45 * signal
    choice = np.where(np.concatenate([right, np.ones((1, *shape[1:]), bool)]), 1, 2).astype(np.int32)
    nll = np.concatenate([rng.random(shape) * 0.2 + ~right, np.zeros((1, *shape[1:]))]).astype(np.float32)
    signals = dict.fromkeys(("probability", "margin", "certainty", "saturation"), signal)
    depths = (4.0, 6.0, 8.0, 10.0)
    return Features((3, 5, 7), depths, signals, choice, nll, np.ones(shape[1:], bool), 1, {})


@pytest.mark.parametrize("kind", ["agreement=0.85", "loss=0.2"])
def test_chosen_thresholds_keep_the_promise_on_the_population(kind: str) -> None:
    population, target = features(4000), parse_target(kind)
    rng = np.random.default_rng(1)
    broken, used = 0, 0
    for _ in range(30):
        order = rng.permutation(4000)[:160]
        one = control_risk(population.only(order[:80]), population.only(order[80:]), target, Settings(DELTA))
        truth = losses(population, target, replay(population, "probability", one.thresholds).left).mean()
        broken += truth > target.limit
        used += one.promised and one.layers < 10
    assert broken <= 7
    assert used >= 25, "nothing was promised, so nothing was tested"


def test_the_search_goes_from_nobody_to_ever_cheaper_and_beats_its_start() -> None:
    path = search_path(features(60), Target("agreement", 0.8), "probability")
    assert path[0].layers == 10
    assert path[0].risk == 0
    costs = [one.layers for one in path]
    assert costs == sorted(costs, reverse=True)
    assert len(path) > 5


def test_looks_count_when_they_are_asked_to() -> None:
    """Where a look costs more than all layers behind it, no exit opens."""
    assert len(search_path(features(60), Target("agreement", 0.8), "probability", head=20.0)) == 1


def test_sequences_without_a_counted_token_are_refused() -> None:
    found = features(3)
    found.counted[1] = False
    with pytest.raises(DataError, match="D471"):
        found.only(np.array([0, 1]))
