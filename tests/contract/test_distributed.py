"""A search whose candidates are evaluated by several processes finds what it finds in one."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from shoal.api.journal import journaled
from shoal.api.prune import prune
from shoal.errors import UsageError
from shoal.evaluation.distributed_loss import CHUNKS, DistributedLoss, LossWorker, loss_workers
from shoal.evaluation.plan_loss import PlanLoss
from shoal.ledger import Ledger
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.plan import Plan, drop
from shoal.search.greedy import greedy

from .families import tiny
from .planted import planted, random_data
from .test_fast import long_text

DATA = random_data(6, 20)
with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs the extra ray; runs where it is installed"
)


class Pool:
    """Processes as `Machines` has them, in this one: the last that was asked answers first."""

    def __init__(self, model: Any, count: int) -> None:
        self.count = count
        self.loss_workers = [LossWorker(model) for _ in range(count)]
        self.asked: list[str] = []

    def at(self, jobs: Sequence[tuple[int, Sequence[Any]]]) -> Iterator[Any]:
        self.asked.append(f"at {[place for place, _ in jobs]}")
        return (self.loss_workers[place].do(*args) for place, args in reversed(jobs))

    def anywhere(self, jobs: Sequence[Sequence[Any]]) -> Iterator[Any]:
        self.asked.append(f"anywhere {len(jobs)}")
        return (self.loss_workers[number % self.count].do(*args) for number, args in reversed(list(enumerate(jobs))))


def plans(model: Any) -> list[Plan]:
    whole = Plan.identity(inspect(model))
    return [whole, *(drop(whole, [layer]) for layer in range(whole.depth()))]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_parts_are_those_of_one_process(family: str) -> None:
    model = tiny(family)
    here, pool = PlanLoss(model, DATA), Pool(model, 2)
    there = DistributedLoss(model, DATA, pool)
    wanted = plans(model)
    assert there.parts(wanted, range(6)) == here.parts(wanted, range(6))
    assert [there(plan) for plan in wanted] == [here(plan) for plan in wanted]
    assert pool.asked == ["at [0, 1]"], "what is known is not computed again"


def test_few_batches_of_many_plans_are_parted_by_plan() -> None:
    model = tiny("llama")
    pool = Pool(model, 2)
    wanted = plans(model)
    assert DistributedLoss(model, DATA, pool).parts(wanted, [3]) == PlanLoss(model, DATA).parts(wanted, [3])
    assert pool.asked == [f"anywhere {min(len(wanted), 2 * CHUNKS)}"]


def test_a_search_and_its_journal_are_those_of_one_process(tmp_path: Path) -> None:
    model, data = planted("llama"), long_text("llama")
    whole = Plan.identity(inspect(model))

    def found(path: Path, pool: Any) -> tuple[Any, list[dict[str, Any]]]:
        objective = journaled(model, whole, path=path, batch=2, pool=pool)(data)
        answer = greedy(whole, objective=objective, drop=2, legal=lambda plan: True)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return answer, [{name: value for name, value in line.items() if name != "spent"} for line in lines]

    assert found(tmp_path / "there", Pool(model, 3)) == found(tmp_path / "here", None)
    # and one goes on where the other was stopped
    half = (tmp_path / "here").read_text().splitlines()[:4]
    (tmp_path / "half").write_text("\n".join(half) + "\n")
    assert found(tmp_path / "half", Pool(model, 2))[0] == found(tmp_path / "here", None)[0]


def test_the_seconds_of_processes_are_remembered() -> None:
    model, memo = tiny("llama"), Ledger[Any]()
    wanted = plans(model)
    DistributedLoss(model, DATA, Pool(model, 2), memo=memo).parts(wanted, range(6))
    PlanLoss(model, DATA, memo=memo).parts(wanted, range(6))
    assert memo.saved == pytest.approx(sum(map(memo.seconds, memo)))
    assert memo.saved > 0


def test_ray_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"U571.*pip install"):
        prune(Loaded(tiny("llama"), None, "tiny"), method="sleb", drop=1, data=DATA, writable=False, ray="local")


def test_a_method_without_candidates_is_told_so() -> None:
    with pytest.raises(UsageError, match=r"U573.*sleb"):
        prune(Loaded(tiny("llama"), None, "tiny"), method="shortgpt", drop=1, data=DATA, writable=False, ray="local")


def test_a_model_that_is_read_from_files_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.evaluation.distributed_loss.is_placed", lambda model: True)
    with pytest.raises(UsageError, match=r"U572.*--stream"):
        loss_workers(tiny("llama"), "local", 2)


@pytest.mark.slow
@with_ray
def test_processes_of_ray_find_the_same_and_one_that_dies_is_replaced(tmp_path: Path) -> None:
    model, data = planted("llama"), long_text("llama")
    loaded = Loaded(model, None, "tiny")
    asked: dict[str, Any] = {"method": "sleb", "drop": 2, "data": data, "writable": False}
    here = prune(loaded, **asked)
    assert prune(loaded, **asked, ray="local", workers=2).found == here.found
    with loss_workers(model, "local", 2) as pool:
        assert pool is not None
        loss = DistributedLoss(model, data, pool)
        wanted = plans(model)
        first = loss.parts(wanted, [0])
        import ray

        ray.kill(pool._processes[0], no_restart=False)
        assert loss.parts(wanted, range(len(loss.batches))) == PlanLoss(model, data).parts(
            wanted, range(len(loss.batches))
        )
        assert first == PlanLoss(model, data).parts(wanted, [0])


@pytest.mark.slow
@with_ray
def test_an_error_in_a_process_comes_back_as_what_it_is() -> None:
    with loss_workers(tiny("llama"), "local", 1) as pool:
        assert pool is not None
        answers = pool.anywhere([((random_data(1, 4096), {"batch": 1}), [], None)])
        with pytest.raises(UsageError, match="U510"):
            next(answers)
