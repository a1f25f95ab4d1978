"""The journal: a search that was cut off goes on, and a file that is not this search's is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from shoal.api import journal as module
from shoal.api.journal import journaled, kept, mean_nll
from shoal.errors import DataError
from shoal.evaluation import perplexity
from shoal.evaluation.plan_loss import PlanLoss
from shoal.ledger import Ledger
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Plan, drop
from shoal.search.greedy import greedy

from .families import tiny
from .planted import random_data

DATA = random_data(2, 12)


@pytest.fixture
def model() -> Any:
    return tiny("llama")


@pytest.fixture
def plan(model: Any) -> Plan:
    return Plan.identity(inspect(model))


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One entry for each forward over the data."""
    done: list[float] = []

    def counting(*args: Any, **rest: Any) -> float:
        done.append(mean_nll(*args, **rest))
        return done[-1]

    def candidate(loss: PlanLoss, plan: Plan) -> float:
        done.append(evaluate(loss, plan))
        return done[-1]

    evaluate = PlanLoss.__call__
    monkeypatch.setattr(module, "mean_nll", counting)
    monkeypatch.setattr(PlanLoss, "__call__", candidate)
    return done


def search(model: Any, plan: Plan, path: Path | None, *, stop_after: int | None = None, number: int = 2) -> Any:
    objective, calls = journaled(model, plan, path=path)(DATA), 0

    def stopping(candidate: Plan) -> float:
        nonlocal calls
        if stop_after is not None and calls >= stop_after:
            raise KeyboardInterrupt
        calls += 1
        return objective(candidate)

    return greedy(plan, objective=stopping, drop=number, legal=lambda p: True)


def test_the_objective_is_the_perplexity_of_the_running_plan(model: Any, plan: Plan) -> None:
    smaller = drop(plan, [1])
    with running(model, smaller):
        expected = perplexity(model, DATA).nll
    assert journaled(model, plan)(DATA)(smaller) == pytest.approx(expected, rel=1e-9)


def test_each_plan_is_evaluated_once(model: Any, plan: Plan, evaluations: list[float]) -> None:
    objective = journaled(model, plan)(DATA)
    assert objective(drop(plan, [1])) == objective(drop(plan, [1]))
    assert len(evaluations) == 1


@pytest.mark.parametrize("stop_after", range(8))
def test_a_search_that_was_cut_off_evaluates_nothing_again(
    model: Any, plan: Plan, evaluations: list[float], tmp_path: Path, stop_after: int
) -> None:
    path = tmp_path / "new folder" / "journal.jsonl"
    if stop_after < 7:
        with pytest.raises(KeyboardInterrupt):
            search(model, plan, path, stop_after=stop_after)
    else:
        search(model, plan, path)
    assert len(evaluations) == 1 + stop_after
    evaluations.clear()
    found = search(model, plan, path)
    assert len(evaluations) == 1 + 7 - stop_after, "the dense value, and the 4 + 3 candidates that were not known"
    assert found == search(model, plan, None)


def test_a_larger_budget_goes_on_where_the_smaller_ended(
    model: Any, plan: Plan, evaluations: list[float], tmp_path: Path
) -> None:
    search(model, plan, tmp_path / "j", number=2)
    evaluations.clear()
    search(model, plan, tmp_path / "j", number=3)
    assert len(evaluations) == 1 + 2


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_last_line_that_was_cut_short_is_computed_again(
    model: Any, plan: Plan, evaluations: list[float], tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "j"
    expected = search(model, plan, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    evaluations.clear()
    assert search(model, plan, path) == expected
    assert len(evaluations) == (1 if cut == 1 else 2), "without its line end alone the line is whole"
    evaluations.clear()
    assert search(model, plan, path) == expected
    assert len(evaluations) == 1
    lines = path.read_text().splitlines()
    assert len(lines) == (8 if cut == 1 else 9)


def test_the_file_is_lines_of_json_and_says_what_it_belongs_to(model: Any, plan: Plan, tmp_path: Path) -> None:
    search(model, plan, tmp_path / "j")
    head, *rest = [json.loads(line) for line in (tmp_path / "j").read_text().splitlines()]
    assert head["journal"] == "shoal-journal/1"
    assert head["base"] == plan.base.fingerprint
    assert head["data"] == DATA.info.sha256
    assert head["dense"] == pytest.approx(mean_nll(model, DATA))
    assert [set(entry) for entry in rest] == [{"plan", "nll", "spent"}] * 7


def test_a_search_that_goes_on_is_charged_with_what_it_took_before(model: Any, plan: Plan, tmp_path: Path) -> None:
    path, now = tmp_path / "j", Ledger[Any]()
    search(model, plan, path)
    spent = [json.loads(line)["spent"] for line in path.read_text().splitlines()[1:]]
    assert spent == sorted(spent)
    assert spent[-1] > 0
    objective = journaled(model, plan, path=path, memo=now)(DATA)
    assert now.saved == spent[-1]
    objective(drop(plan, [0, 1, 2]))
    last = json.loads(path.read_text().splitlines()[-1])["spent"]
    assert last > spent[-1], "a new candidate adds to it"
    other = Ledger[Any]()
    journaled(model, plan, path=tmp_path / "new", memo=other)
    assert other.saved == 0, "a new journal charges nothing"


def test_an_empty_file_is_a_new_journal(model: Any, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "j").touch()
    search(model, plan, tmp_path / "j")
    assert len((tmp_path / "j").read_text().splitlines()) == 8


def test_a_broken_candidate_is_kept_as_null_and_not_evaluated_again(
    plan: Plan, tmp_path: Path, evaluations: list[float]
) -> None:
    broken = copy.deepcopy(tiny("llama"))
    objective = journaled(broken, plan, path=tmp_path / "j")(DATA)
    broken.model.layers[3].mlp.down_proj.weight.data.fill_(math.nan)
    assert math.isnan(objective(drop(plan, [1])))
    assert json.loads((tmp_path / "j").read_text().splitlines()[-1])["nll"] is None
    evaluations.clear()
    again = journaled(tiny("llama"), plan, path=tmp_path / "j")(DATA)
    assert math.isnan(again(drop(plan, [1])))
    assert len(evaluations) == 1


def test_other_data_models_and_weights_are_refused(model: Any, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "j"
    search(model, plan, path)
    before = path.read_bytes()
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.down_proj.weight.data *= 1.5
    qwen = tiny("qwen2")
    for args, data in (
        ((model, plan), random_data(2, 12, seed=1)),
        ((other, plan), DATA),
        ((qwen, Plan.identity(inspect(qwen))), DATA),
    ):
        with pytest.raises(DataError, match="belongs to another model or other data; name another file") as raised:
            journaled(*args, path=path)(data)
        assert raised.value.code == "D430"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"hello\n", b"\n\n", b"[1, 2]\n", b'{"a": 1}\n', b"\xff\xfe\x00", b"null\n", b'{"journal": "shoal-journal/2"}\n'],
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(
    model: Any, plan: Plan, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    with pytest.raises(DataError, match="is not a journal of Shoal; name another file") as raised:
        journaled(model, plan, path=path)(DATA)
    assert raised.value.code == "D430"
    assert path.read_bytes() == content


def test_a_place_where_no_file_can_be_is_refused(model: Any, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "j"):
        with pytest.raises(DataError, match=r"cannot keep a journal at .*; name another file") as raised:
            journaled(model, plan, path=path)(DATA)
        assert raised.value.code == "D430"


def test_a_methods_own_objective_is_kept_and_told_to_others(model: Any, plan: Plan, tmp_path: Path) -> None:
    asked: list[str] = []

    def own(candidate: Plan) -> float:
        asked.append(str(candidate))
        return float(len(candidate.layers()))

    path, memo, smaller = tmp_path / "j", Ledger[Any](), [drop(plan, [layer]) for layer in range(3)]
    first = kept(own, "depth", plan, path=path, memo=memo)
    assert [first(one) for one in [*smaller, *smaller]] == [3.0] * 6
    assert asked == [str(plan), *map(str, smaller)], "the dense value, and each once"
    asked.clear()
    again = kept(own, "depth", plan, path=path)
    assert [again(one) for one in smaller] == [3.0] * 3
    assert asked == [str(plan)], "what the journal holds is not asked again"
    asked.clear()
    other = kept(own, "depth", plan, path=None, memo=memo)
    assert [other(one) for one in smaller] == [3.0] * 3
    assert not asked, "nor what another search found"
    assert memo.saved > 0
    with pytest.raises(DataError, match="D430"):
        kept(own, "width", plan, path=path)
