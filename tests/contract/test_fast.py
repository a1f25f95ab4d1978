"""The fast objective: what is shared is exact for every family, and a race picks what evaluating everything would."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.api.journal import Journaled, journaled
from shoal.evaluation.plan_loss import PlanLoss
from shoal.evaluation.race import race
from shoal.evaluation.scoring import sequence_nll
from shoal.ledger import Ledger
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Plan, check, drop, parse_plan
from shoal.plan.prefix import prefixes, shared
from shoal.recording.state_store import StateStore
from shoal.search.greedy import greedy

from .families import DEPTH, FAMILIES, tiny
from .planted import data_of, own_text, planted, random_data
from .shares import every

DATA = random_data(5, 20)
CARRIES_MORE = {"gemma3n_text"}
"""Families whose later layers need more of the earlier ones than the hidden state."""


def model_of(family: str) -> Any:
    try:
        return tiny(family)
    except ValueError:  # a family without SDPA
        return tiny(family, "eager")


def candidates(model: Any) -> list[Plan]:
    spec = inspect(model)
    plan = Plan.identity(spec)
    found = [plan, *(drop(plan, [i]) for i in range(DEPTH)), drop(plan, [2], part="mlp"), drop(plan, [1, 2])]
    return [one for one in found if not check(one, spec)]


def in_full(model: Any, plan: Plan, data: Any = DATA) -> tuple[tuple[float, int], ...]:
    with running(model, plan):
        return sequence_nll(model, data, batch=2)


def by_parts(loss: PlanLoss, plan: Plan) -> tuple[tuple[float, int], ...]:
    parts = loss.parts([plan], range(len(loss.batches)))[0]
    return tuple(pair for part in parts for pair in zip(part.sums, part.counts, strict=True))


@pytest.mark.parametrize("family", every(2, FAMILIES))
def test_beginning_in_the_middle_is_exact(family: str) -> None:
    model = model_of(family)
    loss = PlanLoss(model, DATA, batch=2)
    plans = candidates(model)
    for plan in plans:
        assert by_parts(loss, plan) == in_full(model, plan), plan
    everything = len(plans) * DEPTH * len(loss.batches)
    if family in CARRIES_MORE:
        assert loss.layers_run == everything
    else:
        assert loss.layers_run < 0.8 * everything


@pytest.mark.parametrize("notation", ["0-3,1", "0,2,1,3", "0-1,2@0,3", "(0|1),2,3", "0x2,1-3", "0-2,3@2", "1,0,2-3"])
def test_other_plans_than_removals_are_exact(notation: str) -> None:
    model = tiny("llama")
    whole = Plan.identity(inspect(model))
    loss = PlanLoss(model, DATA, batch=2)
    for plan in (whole, parse_plan(notation, whole), parse_plan(notation, whole), drop(whole, [3])):
        assert by_parts(loss, plan) == in_full(model, plan)


def test_a_cut_is_not_crossed_by_what_later_steps_read() -> None:
    whole = Plan.identity(inspect(tiny("llama")))
    assert set(prefixes(whole)) == {1, 2, 3}
    assert set(prefixes(parse_plan("0-1,2@0,3", whole))) == {3}
    assert set(prefixes(parse_plan("0-3,1", whole))) == {1}
    assert prefixes(drop(whole, [1]))[2] == (2, whole.steps()[:1])


def test_plans_share_where_they_part() -> None:
    whole = Plan.identity(inspect(tiny("llama")))
    steps = whole.steps()
    plans = [drop(whole, [i]) for i in range(4)]
    assert shared(plans) == {(1, steps[:1]), (2, steps[:2]), (3, steps[:3])} - {(3, steps[:3])}
    assert shared([whole]) == set()


@pytest.mark.parametrize(("memory", "disk"), [(0, 1 << 24), (2000, 1 << 24), (0, 0), (6000, 12000)])
def test_beyond_the_memory_states_go_to_disk_or_are_computed_again(
    memory: int, disk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loss = PlanLoss(model, DATA, batch=2, memory=memory, disk=disk)
    for plan in candidates(model):
        assert by_parts(loss, plan) == in_full(model, plan)
    assert bool(loss.states.spilled) == bool(disk)
    assert not list(tmp_path.iterdir()), "the file has no name"
    loss.close()
    if not disk:
        assert loss.layers_run == len(candidates(model)) * DEPTH * len(loss.batches)


def test_searches_tell_each_other_what_plans_scored() -> None:
    model, memo = tiny("llama"), Ledger[Any]()
    plans = candidates(model)
    alone = PlanLoss(model, DATA, batch=2)
    expected = alone.parts(plans, range(len(alone.batches)))
    first = PlanLoss(model, DATA, batch=2, memo=memo)
    assert first.parts(plans, [0]) == [parts[:1] for parts in expected]
    assert memo.saved == 0
    second = PlanLoss(model, DATA, batch=2, memo=memo)
    assert second.parts(plans, range(len(second.batches))) == expected
    assert memo.saved > 0
    layers = second.layers_run
    assert 0 < layers < alone.layers_run  # the batch that the first one had run was not run again
    assert second.parts(plans, range(len(second.batches))) == expected
    assert second.layers_run == layers
    saved = memo.saved
    other = PlanLoss(model, random_data(5, 20, seed=1), batch=2, memo=memo)
    assert other(plans[0]) != second(plans[0])  # another text is another question
    assert PlanLoss(model, DATA, batch=1, memo=memo)(plans[0]) == pytest.approx(second(plans[0]))
    assert memo.saved > saved


def test_states_are_copies_and_the_oldest_goes_first() -> None:
    store = StateStore(torch.device("cpu"), memory=2 * 400, disk=0)
    state = torch.zeros(100)
    for name in "abc":
        store.put(name, state)
        state += 1
    assert "a" not in store
    assert (store.get("b") == 1).all() and (store.get("c") == 2).all()
    half = StateStore(torch.device("cpu"), memory=0, disk=3 * 200)
    for number in range(5):
        half.put(number, torch.full((100,), float(number), dtype=torch.bfloat16))
    assert [number in half for number in range(5)] == [False, False, True, True, True]
    assert all((half.get(number) == number).all() for number in (2, 3, 4))
    got = half.get(4)
    assert got is not None and got.dtype == torch.bfloat16
    got += 1
    assert (half.get(4) == 4).all()


def test_a_model_is_left_as_it_was() -> None:
    model = copy.deepcopy(tiny("llama")).train()
    PlanLoss(model, DATA)(drop(Plan.identity(inspect(model)), [1]))
    assert model.training and type(model.model.layers) is torch.nn.ModuleList


def long_text(family: str) -> Any:
    """The planted model's own text as many short windows."""
    return data_of(own_text(family).ids.reshape(-1, 16))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_fast_search_finds_what_the_exhaustive_one_does(family: str) -> None:
    model, data = planted(family), long_text(family)
    plan = Plan.identity(inspect(model))
    spec = inspect(model)
    fast = journaled(model, plan)(data)

    def whole(candidate: Plan) -> float:
        with running(model, candidate):
            scored = sequence_nll(model, data)
        return math.fsum(total for total, _ in scored) / sum(count for _, count in scored)

    found = greedy(plan, objective=fast, drop=2, legal=lambda p: not check(p, spec))
    assert found == greedy(plan, objective=whole, drop=2, legal=lambda p: not check(p, spec)), "bit for bit"
    assert isinstance(fast, Journaled) and len(fast.known) < 7, "some were dropped"


def test_a_race_keeps_as_many_as_it_is_asked_for() -> None:
    model, data = planted("llama"), long_text("llama")
    plans = candidates(model)
    exact = [PlanLoss(model, data)(plan) for plan in plans]
    best = sorted(exact)
    for keep in (1, 3):
        gone: list[Plan] = []
        values = race(PlanLoss(model, data), plans, keep=keep, dropped=lambda plan, _, gone=gone: gone.append(plan))
        assert set(best[:keep]) <= set(values)
        assert all(value in (None, whole) for value, whole in zip(values, exact, strict=True))
        assert gone == [] or {str(p) for p in gone} == {str(p) for p, v in zip(plans, values, strict=True) if v is None}
    assert None in race(PlanLoss(model, data), plans)


def test_few_data_decide_nothing_early() -> None:
    model = planted("llama")
    data = data_of(own_text("llama").ids[:1])
    assert None not in race(PlanLoss(model, data), candidates(model))


def test_a_plan_without_a_finite_loss_leaves_the_race_with_it() -> None:
    model = copy.deepcopy(planted("llama"))
    model.model.layers[3].mlp.down_proj.weight.data.fill_(math.nan)
    plan = Plan.identity(inspect(model))
    values = race(PlanLoss(model, long_text("llama")), [drop(plan, [i]) for i in range(4)])
    assert [value is not None and math.isnan(value) for value in values] == [True, True, True, False]


def test_what_lost_is_no_value_in_the_journal_and_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = planted("llama"), long_text("llama")
    plan = Plan.identity(inspect(model))
    search = {"drop": 2, "legal": lambda p: True}
    first = greedy(plan, objective=journaled(model, plan, path=tmp_path / "j")(data), **search)
    lines = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()][1:]
    valued, lost = ([one for one in lines if name in one] for name in ("plan", "lost"))
    assert len(valued) + len(lost) == 4 + 3 and lost
    assert not {one["lost"] for one in lost} & {one["plan"] for one in valued}
    assert all(one["batches"] < len(data) for one in lost)
    monkeypatch.setattr(PlanLoss, "parts", lambda *_, **__: pytest.fail("evaluated again"))
    again = journaled(model, plan, path=tmp_path / "j")(data)
    assert greedy(plan, objective=again, **search) == first
    monkeypatch.undo()
    other = journaled(model, plan, path=tmp_path / "j")(data)
    assert other(parse_plan(lost[0]["lost"], plan)) > first.trace[0].score, "asked for by itself it is evaluated"


def test_a_race_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = planted("llama"), long_text("llama")
    plan = Plan.identity(inspect(model))
    whole = PlanLoss._part
    calls = 0

    def stopping(loss: PlanLoss, *args: Any, **rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 60:
            raise KeyboardInterrupt
        return whole(loss, *args, **rest)

    monkeypatch.setattr(PlanLoss, "_part", stopping)
    with pytest.raises(KeyboardInterrupt):
        greedy(plan, objective=journaled(model, plan, path=tmp_path / "j")(data), drop=2, legal=lambda p: True)
    monkeypatch.undo()
    kept = (tmp_path / "j").read_text().splitlines()
    assert len(kept) > 1 and all(json.loads(line) for line in kept)
    resumed = greedy(plan, objective=journaled(model, plan, path=tmp_path / "j")(data), drop=2, legal=lambda p: True)
    assert resumed == greedy(plan, objective=journaled(model, plan)(data), drop=2, legal=lambda p: True)
    assert (tmp_path / "j").read_text().splitlines()[: len(kept)] == kept
