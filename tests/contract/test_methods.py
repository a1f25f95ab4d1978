"""Published methods, all of the registry: planted answers, repetition, progress; and what Shoal adds to them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.api.budget import counted_budget
from shoal.data.split import hold_out
from shoal.errors import DataError, UsageError
from shoal.methods._job import PruningJob
from shoal.methods.auto import auto
from shoal.methods.position import position
from shoal.models.inspect import inspect
from shoal.plan import Plan, Run
from shoal.plan import drop as drop_layers
from shoal.plan.steps import runs
from shoal.registry import Entry, entries, get
from shoal.scores import Found
from shoal.transforms.refit import refit

from .families import tiny
from .method_tasks import METHODS, TASK, Untouchable, filled, random_task, task_of
from .planted import PLANTED, own_text, planted, random_data
from .shares import every, pairs
from .test_tasks import Letters

ALL = [pytest.param(entry, id=entry.name) for entry in entries("methods").values() if entry.removes]
LOOKING = [param for param in ALL if METHODS[str(param.id)].chooses_by != "place"]


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task for methods that need one."""
    file = tmp_path_factory.mktemp("task") / "task.jsonl"
    file.write_text(TASK)
    return file


def run(entry: Entry, task: PruningJob, number: int, file: Path) -> Found:
    """What the method finds when `number` of its pieces are to go; layers for one that takes only a budget."""
    method, own = entry.load(), METHODS[entry.name]
    task, needed = replace(task, tokenizer=Letters()), filled(own.needed, file)
    if own.counts != "budget":
        return method(task, drop=number, **needed)
    depth = task.plan.depth()
    return method(replace(task, budget=counted_budget("layers", 1 - number / depth, task.spec)), **needed)


def gone(plan: Plan) -> set[tuple[int, str]]:
    """The attentions and mlps that do not run."""
    parts = ("attention", "mlp")
    there = {(_place(r), p) for r in runs(plan.steps()) for p in (parts if r.part == "layer" else (r.part,))}
    return {(layer, part) for layer in range(plan.depth()) for part in parts} - there


def _place(run: Run) -> int:
    """The layer that `run` is, also where it runs another's matrices."""
    folded = run.weights is not None and run.weights.startswith("fold-")
    return int(str(run.weights)[5:]) if folded else run.layer


@pytest.mark.parametrize(("entry", "family"), pairs(2, LOOKING, PLANTED))
def test_a_method_that_looks_removes_the_layer_that_does_nothing_first(
    entry: Entry, family: str, task_file: Path
) -> None:
    found = run(entry, task_of(planted(family), own_text(family)), 1, task_file)
    assert {layer for layer, _ in gone(found.plan)} == {PLANTED[family]}
    shared = any(run.tie is not None for run in runs(found.plan.steps()))
    assert found.weights or shared or found.trace[0].notation == str(found.plan)


@pytest.mark.parametrize("name", [name for name, own in METHODS.items() if own.without_data])
def test_a_method_without_data_looks_at_nothing(name: str) -> None:
    spec = inspect(tiny("llama"))
    nothing: Any = Untouchable()
    task = PruningJob(nothing, nothing, Plan.identity(spec), spec=nothing, legal=lambda plan: True, objective=nothing)
    assert str(entries("methods")[name].load()(task, drop=2).plan) == METHODS[name].without_data


@pytest.mark.parametrize("entry", every(2, ALL))
def test_a_method_repeats_itself_and_is_nested_where_it_goes_layer_by_layer(entry: Entry, task_file: Path) -> None:
    own = METHODS[entry.name]
    found = [run(entry, random_task(), number, task_file) for number in range(1, own.most + 1)]
    sizes = [len(gone(f.plan)) for f in found]
    each = {"layers": 2, "budget": 2, "parts": 1, "steps": 0}[own.counts]
    least = [number * each for number in range(1, own.most + 1)]
    assert sizes == least or (not own.exact and all(a >= b for a, b in zip(sizes, least, strict=True)))
    again = run(entry, random_task(), 2, task_file)
    assert again.plan == found[1].plan and again.weights.keys() == found[1].weights.keys()
    assert all(torch.equal(tensor, found[1].weights[name]) for name, tensor in again.weights.items())
    if own.nested:
        assert all(gone(one.plan) < gone(other.plan) for one, other in itertools.pairwise(found))
    assert all(f.weights or str(f.plan) in {c.notation for c in f.trace} for f in found)


def test_presets_differ_and_random_follows_the_seed_of_the_task() -> None:
    words = ("first", "last", "middle", "alternate")
    gone = {which: position(random_task(), drop=2, which=which).plan.dropped() for which in words}
    assert gone == {"first": (0, 1), "last": (2, 3), "middle": (1, 2), "alternate": (0, 2)}
    drawn = {seed: position(random_task(seed=seed), drop=2, which="random").plan.dropped() for seed in range(12)}
    assert set(drawn.values()) <= set(itertools.combinations(range(4), 2)) and len(set(drawn.values())) > 2


def test_progress_reaches_the_measure_and_the_search(task_file: Path) -> None:
    for entry in (get("methods", name) for name in METHODS):
        reports: list[Any] = []
        run(entry, random_task(progress=lambda *report, to=reports: to.append(report)), 1, task_file)
        assert bool(reports) == (METHODS[entry.name].without_data is None), entry.name


def test_auto_is_no_worse_on_what_it_held_back_than_any_of_its_candidates() -> None:
    found = auto(random_task(), drop=2)
    assert [c.score for c in found.trace] == sorted(c.score for c in found.trace) and len(found.trace) == 4
    assert {c.note for c in found.trace} == {"refit", "as it is"}
    with pytest.raises(UsageError, match="U540"):
        auto(random_task())
    with pytest.raises(DataError, match="D413"):
        auto(task_of(tiny("llama"), random_data(1, 16)), drop=1)


def test_autos_refit_is_in_the_end_made_on_all_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.methods.auto._loss", lambda task, one, held: 0.0 if one.weights else 1.0)
    task = random_task()
    found = auto(task, drop=1)
    bare = replace(found, plan=drop_layers(task.plan, found.plan.dropped()), weights={})
    whole, part = task.then(refit, bare), replace(task, data=hold_out(task.data)[0]).then(refit, bare)
    assert found.plan == whole.plan
    for name, tensor in found.weights.items():
        assert torch.equal(tensor, whole.weights[name])
        assert not torch.equal(tensor, part.weights[name])
