"""A search whose candidates are evaluated by several processes finds what it finds in one."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from shoal.api.journal import journaled
from shoal.api.prune import prune
from shoal.errors import ShoalNote, UsageError
from shoal.evaluation.cluster_model import readable
from shoal.evaluation.cluster_resources import Cluster, require_reachable, require_resources
from shoal.evaluation.distributed_loss import CHUNKS, DistributedLoss, LossWorker, loss_workers
from shoal.evaluation.plan_loss import PlanLoss
from shoal.ledger import Ledger
from shoal.models.inspect import inspect
from shoal.models.load import Loaded, load
from shoal.models.origin import Origin, fingerprints
from shoal.models.placed import is_placed
from shoal.plan import Plan, drop
from shoal.search.greedy import greedy

from .families import tiny
from .planted import planted, random_data
from .test_api import model_folder
from .test_fast import long_text

DATA = random_data(6, 20)
with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs the extra ray; runs where it is installed"
)


class Pool:
    """Processes as `Machines` has them, in this one: the last that was asked answers first."""

    def __init__(self, model: Any, count: int) -> None:
        self.count = count
        self.loss_workers = [LossWorker(Loaded(model, None, "tiny")) for _ in range(count)]
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


def test_what_a_cluster_cannot_give_is_one_sentence() -> None:
    loaded = Loaded(tiny("llama"), None, "tiny")
    with pytest.raises(UsageError, match=r"U764.*1\.5"):
        require_reachable(Cluster("local", 2, 1.5), loaded)
    with pytest.raises(UsageError, match=r"U765.*4 CPUs and 1 GPUs on 2 machines.*2 workers with 1 CPU and 1 GPUs"):
        require_resources(Nodes({"CPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}), Cluster("auto", 2, 1))
    with pytest.raises(UsageError, match=r"U765.*fewer --workers$"):
        require_resources(Nodes({"CPU": 2.0}, {"CPU": 2.0}), Cluster("auto", 5))


@pytest.mark.parametrize(
    ("gpus", "machines", "holds"),
    [(0, [0, 0], 8), (1, [1, 1], 2), (0.5, [1, 1], 4), (0.3, [2, 0], 4), (0.4, [1, 1], 4), (2, [3, 1], 1), (1, [0], 0)],
)
def test_a_share_of_a_gpu_is_of_one_and_whole_ones_are_in_one_machine(
    gpus: float, machines: list[int], holds: int
) -> None:
    nodes = Nodes(*({"CPU": 4.0, **({"GPU": float(own)} if own else {})} for own in machines))
    if holds:
        require_resources(nodes, Cluster("auto", holds, gpus))
    with pytest.raises(UsageError, match="U765"):
        require_resources(nodes, Cluster("auto", holds + 1, gpus))


class Nodes:
    """What Ray says of a cluster of machines with these resources."""

    def __init__(self, *machines: dict[str, float]) -> None:
        self.machines = machines

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": own} for own in self.machines]

    def cluster_resources(self) -> dict[str, float]:
        kinds = {kind for own in self.machines for kind in own}
        return {kind: sum(own.get(kind, 0) for own in self.machines) for kind in kinds}


def test_a_model_on_a_gpu_wants_workers_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded(tiny("llama"), None, "tiny")
    monkeypatch.setattr("shoal.evaluation.cluster_resources.placed_devices", lambda model: ("0", "cpu"))
    with pytest.raises(UsageError, match=r"U763.*cuda:0.*--gpus-per-worker 1"):
        require_reachable(Cluster("local", 2), loaded)
    require_reachable(Cluster("local", 2, 0.5), loaded)


def test_workers_read_what_was_read_here_and_know_another_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    loaded = load(folder, device="cpu", dtype="float32")
    source = readable(loaded, "cpu")
    assert source is not None and loaded.origin is not None
    assert loaded.origin.source == str(folder.resolve())
    assert fingerprints(source.loaded().model) == fingerprints(loaded.model)
    with torch.no_grad():
        next(loaded.model.model.layers[1].parameters()).data[0] += 1
    changed = readable(loaded, "cpu")
    assert changed is not None
    with pytest.raises(UsageError, match=r"U766.*layers\.1\..*than the model in memory"):
        changed.loaded()
    assert readable(Loaded(loaded.model, None, "live"), "cpu") is None


def test_a_streamed_model_is_read_by_each_worker(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    streamed, whole = load(folder, device="cpu", stream=True), load(folder, device="cpu")
    source = readable(streamed, "cpu")
    assert source is not None and is_placed(source.loaded().model)
    with pytest.raises(UsageError, match=r"U572.*give its folder"):
        require_reachable(Cluster("local", 2), replace(streamed, origin=None))

    pool, here = Pool(streamed.model, 2), journaled(whole.model, identity(whole), batch=2)(DATA)
    there = journaled(streamed.model, identity(whole), batch=2, pool=cast(Any, pool))(DATA)
    wanted = [plan for plan in plans(whole.model) if plan.depth() > 1]
    assert there.race(wanted) == [here(plan) for plan in wanted], "no plan is dropped, and all are the same"
    assert pool.asked == ["anywhere 2"], "each process reads every layer once for its share of the plans"


def identity(loaded: Loaded) -> Plan:
    return Plan.identity(loaded.opened.spec)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


ASKED: dict[str, Any] = {"method": "sleb", "drop": 2, "data": DATA, "writable": False}
THERE: dict[str, Any] = {"ray": "local", "workers": 2}


@pytest.mark.slow
@with_ray
@pytest.mark.parametrize("how", [{}, {"stream": True}, {"device_map": {"": "cpu"}}], ids=["whole", "stream", "map"])
def test_processes_of_ray_read_the_folder_and_find_the_same(
    folder: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = prune(load(folder, device="cpu"), **ASKED)
    monkeypatch.setattr("shoal.evaluation.cluster.copied", lambda *_: pytest.fail("the model was copied"))
    options = {} if "device_map" in how else {"device": "cpu"}
    assert prune(load(folder, **options, **how), **ASKED, **THERE).found == here.found


@pytest.mark.slow
@with_ray
def test_a_folder_that_workers_do_not_see_is_copied_or_one_sentence(folder: Path, tmp_path: Path) -> None:
    here = prune(load(folder, device="cpu"), **ASKED)
    gone = Origin.of(tmp_path / "gone")
    with pytest.warns(ShoalNote, match=r"cannot read .*gone.*it is copied to the workers"):
        assert prune(replace(load(folder, device="cpu"), origin=gone), **ASKED, **THERE).found == here.found
    with pytest.raises(UsageError, match=r"U572.*cannot read .*gone"):
        prune(replace(load(folder, device="cpu", stream=True), origin=gone), **ASKED, **THERE)


@pytest.mark.slow
@with_ray
def test_a_model_in_memory_is_copied_and_gpus_that_are_not_there_are_refused() -> None:
    loaded = Loaded(planted("llama"), None, "tiny")
    here = prune(loaded, **{**ASKED, "data": long_text("llama")})
    assert prune(loaded, **{**ASKED, "data": long_text("llama")}, **THERE).found == here.found
    with pytest.raises(UsageError, match="U765"):
        prune(loaded, **ASKED, **THERE, gpus_per_worker=64)


@pytest.mark.slow
@with_ray
@pytest.mark.parametrize("read", [True, False], ids=["read", "copied"])
def test_a_process_that_is_killed_at_work_is_replaced_and_its_work_done_again(folder: Path, read: bool) -> None:
    loaded = load(folder, device="cpu")
    loaded = loaded if read else replace(loaded, origin=None)
    with loss_workers(loaded, Cluster("local", 2)) as pool:
        assert pool is not None
        loss = DistributedLoss(loaded.model, DATA, pool)
        wanted, many = plans(loaded.model), range(len(loss.batches))
        first, before = [(0, wanted[0], [0])], [one["pid"] for one in pool.about()]
        long = [(place, plan, [*many] * 100) for place, plan in enumerate(wanted)]
        answers = pool.at([(0, (loss.facts, first, None)), (1, (loss.facts, long, None))])
        assert len(next(answers)) == 1
        os.kill(before[1], signal.SIGKILL)  # which is at the long job
        (found,) = answers
        assert len(found) == len(wanted) * 100 * len(many)
        after = [one["pid"] for one in pool.about()]
        assert after[0] == before[0] and after[1] != before[1]
        assert loss.parts(wanted, many) == PlanLoss(loaded.model, DATA).parts(wanted, many)


@pytest.mark.slow
@with_ray
def test_an_error_in_a_process_comes_back_as_what_it_is() -> None:
    with loss_workers(Loaded(tiny("llama"), None, "tiny"), Cluster("local", 1)) as pool:
        assert pool is not None
        answers = pool.anywhere([((random_data(1, 4096), {"batch": 1}), [(0, plans(tiny("llama"))[0], [0])], None)])
        with pytest.raises(UsageError, match="U510"):
            next(answers)
