"""The searches over layers and parts within a budget, against brute force; and their answers to bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from shoal.api.journal import journaled
from shoal.errors import UsageError
from shoal.evaluation.plan_loss import PlanLoss
from shoal.models.inspect import inspect
from shoal.plan import Plan, check, parse_plan
from shoal.plan.steps import runs
from shoal.registry import entries
from shoal.scores import Budget, Scores
from shoal.search._solve import chain, solve
from shoal.search._table import Table, measure, space
from shoal.search.beam import beam
from shoal.search.dynamic_programming import dynamic_programming
from shoal.search.greedy import greedy
from shoal.search.milp import milp
from shoal.search.one_shot import one_shot
from shoal.search.pareto import pareto

from ..unit.specs import plan_of
from .families import _shrunk
from .planted import random_data

WHOLE = plan_of("0-7")
WORDS = ("keep", "attention", "mlp", "layer")


def searches(*parameters: str) -> dict[str, Callable[..., Any]]:
    """The registered searches whose functions have these parameters."""
    found = {name: entry.load() for name, entry in entries("search").items()}
    return {name: one for name, one in found.items() if {*parameters} <= signature(one).parameters.keys()}


BUDGETED = searches("objective", "budget")


def anything(plan: Plan) -> bool:
    return True


def units(plan: Plan) -> float:
    """An attention costs 1, an mlp 2, a whole layer 3."""
    return sum({"layer": 3, "attention": 1, "mlp": 2}[run.part] for run in runs(plan.steps()))


def budget(share: float) -> Budget:
    return Budget("flops", share, lambda plan: units(plan) / 24)


def gone(plan: Plan) -> list[tuple[int, str]]:
    there = {(run.layer, part) for run in runs(plan.steps()) for part in WORDS[1:3] if run.part in ("layer", part)}
    return [(i, part) for i in range(8) for part in WORDS[1:3] if (i, part) not in there]


def weighted(weights: list[int]) -> Callable[[Plan], float]:
    """Every part of every layer has a weight; the value is the sum of those that are gone."""
    return lambda plan: float(sum(weights[2 * i + (part == "mlp")] for i, part in gone(plan)))


def table_of(losses: list[list[float]], saved: list[list[float]]) -> Table:
    return Table(tuple(range(len(losses))), (WORDS,) * len(losses), tuple(map(tuple, losses)), tuple(map(tuple, saved)))


def split(rows: list[tuple[int, ...]]) -> tuple[list[list[float]], list[list[float]]]:
    """Losses, and savings in hundredths, with nothing for keeping."""
    return [[0.0, *map(float, row[:3])] for row in rows], [[0.0, *(s / 100 for s in row[3:])] for row in rows]


def brute(table: Table, need: float, pairs: dict[tuple[int, int, int], float] | None = None) -> float:
    """The lowest sum over all choices that save enough, infinite when there is none."""
    sizes = [range(len(row)) for row in table.losses]
    found = (c for c in itertools.product(*sizes) if table.saving(c) >= need - 1e-9)
    return min((total(table, chosen, pairs or {}) for chosen in found), default=math.inf)


def total(table: Table, chosen: Any, pairs: dict[tuple[int, int, int], float]) -> float:
    return table.loss(chosen) + sum(pairs.get((i, chosen[i], chosen[i - 1]), 0.0) for i in range(1, len(chosen)))


tables = st.lists(st.tuples(*[st.integers(-3, 30)] * 3, *[st.integers(0, 20)] * 3), min_size=8, max_size=8)


@settings(max_examples=6)
@given(tables, st.integers(1, 160))
def test_the_integer_programme_is_exhaustive_search(rows: list[tuple[int, ...]], need: int) -> None:
    table = table_of(*split(rows))
    chosen, best = solve(table, need / 100), brute(table, need / 100)
    if chosen is None:
        assert best == math.inf
    else:
        assert table.saving(chosen) >= need / 100 - 1e-9
        assert table.loss(chosen) == pytest.approx(best, abs=1e-9)


@pytest.fixture(scope="module")
def eight() -> Any:
    """A Llama of 8 layers whose layers matter differently."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(_shrunk("llama", 8, {})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
    return model


def test_the_integer_programme_is_exhaustive_search_on_measured_differences(eight: Any) -> None:
    spec = inspect(eight)
    plan = Plan.identity(spec)
    loss = PlanLoss(eight, random_data(2, 12), batch=2)

    def legal(smaller: Plan) -> bool:
        return not check(smaller, spec)

    room = space(plan, legal)
    assert room.options == (("keep", "attention", "mlp", "layer"),) * 8
    most = budget(0.6)
    table, dense = measure(room, loss, most, legal, room.whole())
    assert dense == loss(plan)
    chosen = solve(table, 0.4)
    assert chosen is not None
    assert table.loss(chosen) == pytest.approx(brute(table, 0.4), abs=1e-9)
    found = milp(plan, objective=loss, budget=most, legal=legal)
    assert most.met(found.plan) and found.trace[0].score == loss(found.plan) == min(c.score for c in found.trace)
    first = next(c for c in found.trace if c.notation == str(room.build(table.words(chosen))))
    predicted = dense + table.loss(chosen)
    error = loss(parse_plan(first.notation, plan)) - predicted
    assert first.note.endswith(f"additivity error {error:+.4f}")


def test_dynamic_programming_may_save_where_nothing_must_be_saved() -> None:
    table = table_of(*split([(0, 0, 0, 0, 0, 0), (-1, 0, 0, 1, 0, 0)]))
    chosen = chain(table, {}, 0.0, 100)
    assert chosen is not None and table.loss(chosen) == brute(table, 0.0) == -1


@settings(max_examples=6)
@given(tables, st.integers(0, 60), st.randoms())
def test_dynamic_programming_is_exhaustive_search_with_neighbours(
    rows: list[tuple[int, ...]], need: int, draw: Any
) -> None:
    rows = rows[:5]
    table = table_of(*split(rows))
    pairs = {(i, a, b): float(draw.randint(-5, 9)) for i in range(1, 5) for a in range(1, 4) for b in range(1, 4)}
    chosen, best = chain(table, pairs, need / 100, 100), brute(table, need / 100, pairs)
    if chosen is None:
        assert best == math.inf
    else:
        assert table.saving(chosen) >= need / 100 - 1e-9
        assert total(table, chosen, pairs) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_is_met_and_the_value_in_the_trace_is_the_plans(name: str) -> None:
    objective, most = weighted([5, 4, 1, 9, 2, 2, 7, 1, 3, 8, 6, 1, 4, 4, 9, 2]), budget(0.7)
    options = {"grain": "sublayers"} if name in searches("grain") else {}
    found = BUDGETED[name](WHOLE, objective=objective, budget=most, legal=anything, **options)
    assert most.met(found.plan)
    last = found.trace[-1 if name == "greedy" else 0]
    assert (last.notation, last.score) == (str(found.plan), objective(found.plan))


@pytest.mark.parametrize("name", searches("objective", "maps"))
def test_additive_losses_are_solved_exactly_and_have_no_additivity_error(name: str) -> None:
    weights = [5, 4, 1, 9, 2, 2, 7, 1, 3, 8, 6, 1, 4, 4, 9, 2]
    found = BUDGETED[name](WHOLE, objective=weighted(weights), budget=budget(0.7), legal=anything)
    sizes = [1, 2] * 8
    enough = (s for n in range(9) for s in itertools.combinations(range(16), n) if sum(sizes[i] for i in s) >= 7.2)
    assert found.trace[0].score == min(sum(weights[i] for i in s) for s in enough)
    assert found.trace[0].note.endswith("additivity error +0.0000")


def test_a_second_round_mends_what_additivity_got_wrong() -> None:
    """Alone, the mlps of 0 and 1 cost nothing; together they ruin the model."""

    def objective(plan: Plan) -> float:
        lost = gone(plan)
        both = {(0, "mlp"), (1, "mlp")} <= set(lost)
        return 50.0 * both + sum(0.0 if piece in ((0, "mlp"), (1, "mlp")) else 1.0 for piece in lost)

    once = milp(WHOLE, objective=objective, budget=budget(0.834), legal=anything, rounds=1, tries=1)
    assert once.trace[0].score >= 50 and "additivity error +50.0000" in once.trace[0].note
    twice = milp(WHOLE, objective=objective, budget=budget(0.834), legal=anything)
    assert twice.trace[0].score == 1.0 and len(twice.trace) > 2
    pairs = dynamic_programming(WHOLE, objective=objective, budget=budget(0.834), legal=anything)
    assert pairs.trace[0].score == 1.0
    alone = dynamic_programming(WHOLE, objective=objective, budget=budget(0.834), legal=anything, neighbours=False)
    assert alone.trace[0].score >= 50


def test_an_illegal_solution_is_cut_off_and_the_next_one_taken() -> None:
    def legal(plan: Plan) -> bool:
        return len(set(plan.dropped()) & {0, 1}) < 2

    def objective(plan: Plan) -> float:
        return float(sum(0 if i < 2 else i for i in plan.dropped()) + 9 * (len(gone(plan)) % 2))

    found = milp(WHOLE, objective=objective, budget=budget(0.75), legal=legal)
    assert legal(found.plan) and len(found.plan.dropped()) == 2


@given(st.lists(st.integers(0, 30), min_size=64, max_size=64))
@settings(max_examples=10)
def test_a_beam_of_one_is_greedy_and_a_wide_one_is_exhaustive(marks: list[int]) -> None:
    def objective(plan: Plan) -> float:
        return float(sum(marks[8 * a + b] for a, b in itertools.product(plan.dropped(), repeat=2)))

    for number in (1, 2, 3):
        narrow = beam(WHOLE, objective=objective, drop=number, legal=anything, width=1)
        assert narrow.plan == greedy(WHOLE, objective=objective, drop=number, legal=anything).plan
        wide = beam(WHOLE, objective=objective, drop=number, legal=anything, width=28)
        sets = itertools.combinations(range(8), number)
        assert wide.trace[0].score == min(
            sum(marks[8 * a + b] for a, b in itertools.product(s, repeat=2)) for s in sets
        )
    assert [c.score for c in wide.trace] == sorted(c.score for c in wide.trace)


@pytest.mark.parametrize("name", searches("objective", "drop", "seed"))
def test_the_same_seed_finds_the_same_plan_and_many_trials_the_best(name: str) -> None:
    weights = [9, 3, 7, 1, 8, 2, 6, 4]

    def objective(plan: Plan) -> float:
        return float(sum(weights[i] for i in plan.dropped()))

    def found(seed: int, trials: int) -> Any:
        return BUDGETED[name](WHOLE, objective=objective, drop=2, legal=anything, trials=trials, seed=seed)

    assert found(3, 12) == found(3, 12)
    assert len({found(seed, 4).plan for seed in range(6)}) > 1
    assert found(0, 100).plan.dropped() == (3, 5)


@pytest.mark.parametrize("name", searches("objective", "trials"))
def test_a_search_is_silent_and_leaves_optuna_as_loud_as_it_was(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        BUDGETED[name](WHOLE, objective=weighted([1] * 16), budget=budget(0.7), legal=anything, trials=8)
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(level)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", searches("objective", "drop", "scores"))
def test_scores_give_the_first_plan(name: str) -> None:
    scores = Scores("fake", "decoder", "marks", (5.0, 1, 2, 0, 9, 9, 9, 9), (None,) * 8, 1, 1, "nothing")
    seen: list[Plan] = []

    def objective(plan: Plan) -> float:
        seen.append(plan)
        return 0.0

    BUDGETED[name](WHOLE, objective=objective, drop=3, legal=anything, scores=scores, trials=2)
    assert seen[0].dropped() == (1, 2, 3)


def test_no_plan_of_a_pareto_front_beats_another() -> None:
    objective, most = weighted([5, 4, 1, 9, 2, 2, 7, 1, 3, 8, 6, 1, 4, 4, 9, 2]), budget(0.6)
    found = pareto(WHOLE, objective=objective, budget=most, legal=anything, grain="sublayers", trials=80)
    front = [(units(parse_plan(c.notation, WHOLE)) / 24, c.score) for c in found.trace[1:]]
    assert len(front) > 3
    assert [cost for cost, _ in front] == sorted(cost for cost, _ in front)
    assert [loss for _, loss in front] == sorted((loss for _, loss in front), reverse=True)
    assert found.trace[0].score == min(loss for cost, loss in front if cost <= 0.6 + 1e-9)


def test_parts_are_removed_one_by_one_until_a_layer_is_gone() -> None:
    weights = [0, 0, *([5] * 14)]
    found = greedy(WHOLE, objective=weighted(weights), drop=2, grain="sublayers", legal=anything)
    assert found.plan.dropped() == (0,)
    assert [c.note for c in found.trace] == ["attention of layer 0 removed", "mlp of layer 0 removed"]
    attentions = greedy(WHOLE, objective=weighted(weights), drop=2, grain="attention", legal=anything)
    assert str(attentions.plan) == "0-1m,2-7"


def test_by_saving_the_dear_piece_goes_first() -> None:
    """An mlp saves twice what an attention does; removing either costs the same."""
    weights = [1] * 16
    most = budget(0.9)
    by_loss = greedy(WHOLE, objective=weighted(weights), budget=most, grain="sublayers", legal=anything)
    by_saving = greedy(
        WHOLE, objective=weighted(weights), budget=most, grain="sublayers", rank="saving", legal=anything
    )
    assert gone(by_saving.plan) == [(0, "mlp"), (1, "mlp")]
    assert len(gone(by_loss.plan)) == 2 and most.met(by_loss.plan)
    scores = Scores("fake", "decoder", "marks", tuple(float(i) for i in range(8)), (None,) * 8, 1, 1, "nothing")
    shot = one_shot(WHOLE, scores=scores, budget=budget(0.8), grain="mlp", legal=anything)
    assert str(shot.plan) == "0-2a,3-7"


@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_that_cannot_be_met_names_the_nearest(name: str) -> None:
    def legal(plan: Plan) -> bool:
        return {3, 4, 5, 6, 7} <= {run.layer for run in runs(plan.steps()) if run.part == "layer"}

    with pytest.raises(
        UsageError, match=r"flops=0.3 cannot be met: .* costs 0\.6\d\d; ask for 0\.6\d\d or more"
    ) as raised:
        BUDGETED[name](WHOLE, objective=lambda plan: 0.0, budget=budget(0.3), legal=legal)
    assert raised.value.code == "U543"


@pytest.mark.parametrize("name", BUDGETED)
def test_an_objective_that_fails_says_on_which_plan(name: str) -> None:
    def raising(plan: Plan) -> float:
        raise ZeroDivisionError("no data")

    with pytest.raises(UsageError, match=r"the objective failed on the plan .*ZeroDivisionError: no data") as raised:
        BUDGETED[name](WHOLE, objective=raising, budget=budget(0.7), legal=anything)
    assert raised.value.code == "U544"
    with pytest.raises(UsageError, match="it must return a number") as refused:
        BUDGETED[name](WHOLE, objective=lambda plan: "good", budget=budget(0.7), legal=anything)
    assert refused.value.code == "U545"


@pytest.mark.parametrize("name", BUDGETED)
def test_an_objective_without_any_value_is_no_result(name: str) -> None:
    with pytest.raises(UsageError) as raised:
        BUDGETED[name](WHOLE, objective=lambda plan: math.nan, budget=budget(0.7), legal=anything)
    assert raised.value.code == "U546"


@pytest.mark.parametrize("name", BUDGETED)
def test_nothing_to_choose_from_is_said(name: str) -> None:
    with pytest.raises(UsageError) as raised:
        BUDGETED[name](WHOLE, objective=lambda plan: 0.0, budget=budget(0.7), legal=lambda plan: False)
    assert raised.value.code in ("U542", "U543")


@pytest.mark.parametrize("name", searches("objective", "drop", "budget"))
def test_one_goal_is_given(name: str) -> None:
    for goals in ({}, {"drop": 2, "budget": budget(0.7)}):
        with pytest.raises(UsageError, match="either a number of removals or a budget") as raised:
            BUDGETED[name](WHOLE, objective=lambda plan: 0.0, legal=anything, **goals)
        assert raised.value.code == "U540"
    with pytest.raises(UsageError, match="no grain 'laier'"):
        BUDGETED[name](WHOLE, objective=lambda plan: 0.0, drop=1, legal=anything, grain="laier")


def test_the_journal_is_whole_after_an_objective_that_fails(eight: Any, tmp_path: Path) -> None:
    plan, data = Plan.identity(inspect(eight)), random_data(2, 12)
    inner, calls = journaled(eight, plan, path=tmp_path / "j", batch=2)(data), 0

    def failing(candidate: Plan) -> float:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("the disk is gone")
        return inner(candidate)

    with pytest.raises(UsageError, match="the disk is gone"):
        greedy(plan, objective=failing, drop=2, legal=anything)
    kept = (tmp_path / "j").read_text().splitlines()
    assert len(kept) == 1 + 4
    again = journaled(eight, plan, path=tmp_path / "j", batch=2)(data)
    assert greedy(plan, objective=again, drop=1, legal=anything).plan.dropped() != ()
    assert (tmp_path / "j").read_text().splitlines()[:5] == kept
