"""Published methods, all of the registry: planted answers, repetition, progress; and what Shoal adds to them."""

from __future__ import annotations

import itertools
from dataclasses import replace
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
from shoal.registry import Entry, entries
from shoal.scores import Found
from shoal.transforms.refit import refit

from .families import tiny
from .method_tasks import Untouchable, random_task, task_of
from .planted import PLANTED, own_text, planted, random_data

DATA_FREE = {"hsd", "position", "tyukin", "unified", "poor-mans-bert"}
BY_PLACE = DATA_FREE | {"mka"}
"""What goes is known before the data is seen."""
WITHIN_A_BUDGET = {"puzzle", "nas-prune"}
"""They take no number of layers."""
FREE = WITHIN_A_BUDGET | {"auto"}
"""They may remove more than they must, and something else for a smaller budget."""
OF_PARTS = {"tyukin", "block-pruner"}
"""They count attentions and mlps."""
KEEP_TWO = {"hsd", "laco", "mka", "unified"}
"""Of four layers they leave two or more."""
METHODS = [pytest.param(entry, id=entry.name) for entry in entries("methods").values() if entry.name != "cull-mt"]
SIDE_BY_SIDE = {"cqil"}
"""They run everything."""
MOVED = {"laco"}
"""What a layer did goes on under another number, so which numbers are gone says nothing."""
LOOKING = [param for param in METHODS if param.id not in BY_PLACE | MOVED | SIDE_BY_SIDE]


def run(entry: Entry, task: PruningJob, number: int) -> Found:
    """What the method finds when `number` of its pieces are to go; layers for one that takes only a budget."""
    method = entry.load()
    if entry.name not in WITHIN_A_BUDGET:
        return method(task, drop=number)
    depth = task.plan.depth()
    return method(replace(task, budget=counted_budget("layers", 1 - number / depth, task.spec)))


def gone(plan: Plan) -> set[tuple[int, str]]:
    """The attentions and mlps that do not run."""
    parts = ("attention", "mlp")
    there = {(_place(r), p) for r in runs(plan.steps()) for p in (parts if r.part == "layer" else (r.part,))}
    return {(layer, part) for layer in range(plan.depth()) for part in parts} - there


def _place(run: Run) -> int:
    """The layer that `run` is, also where it runs another's matrices."""
    folded = run.weights is not None and run.weights.startswith("fold-")
    return int(str(run.weights)[5:]) if folded else run.layer


@pytest.mark.parametrize("family", tuple(PLANTED))
@pytest.mark.parametrize("entry", LOOKING)
def test_a_method_that_looks_removes_the_layer_that_does_nothing_first(entry: Entry, family: str) -> None:
    found = run(entry, task_of(planted(family), own_text(family)), 1)
    assert {layer for layer, _ in gone(found.plan)} == {PLANTED[family]}
    assert found.weights or found.trace[0].notation == str(found.plan)


@pytest.mark.parametrize(
    ("name", "plan"),
    [("position", "0-1"), ("poor-mans-bert", "0-1"), ("tyukin", "0,1-2m,3"), ("unified", "0,3"), ("hsd", "0,3")],
)
def test_a_method_without_data_looks_at_nothing(name: str, plan: str) -> None:
    assert name in DATA_FREE
    spec = inspect(tiny("llama"))
    nothing: Any = Untouchable()
    task = PruningJob(nothing, nothing, Plan.identity(spec), spec=nothing, legal=lambda plan: True, objective=nothing)
    assert str(entries("methods")[name].load()(task, drop=2).plan) == plan


@pytest.mark.parametrize("entry", METHODS)
def test_a_method_repeats_itself_and_is_nested_where_it_goes_layer_by_layer(entry: Entry) -> None:
    most = 2 if entry.name in KEEP_TWO | SIDE_BY_SIDE else 3
    found = [run(entry, random_task(), number) for number in range(1, most + 1)]
    sizes = [len(gone(f.plan)) for f in found]
    least = [number * (1 if entry.name in OF_PARTS else 2) for number in range(1, most + 1)]
    if entry.name in SIDE_BY_SIDE:
        least = [0] * most
    assert sizes == least or (entry.name in FREE and all(a >= b for a, b in zip(sizes, least, strict=True)))
    again = run(entry, random_task(), 2)
    assert again.plan == found[1].plan and again.weights.keys() == found[1].weights.keys()
    assert all(torch.equal(tensor, found[1].weights[name]) for name, tensor in again.weights.items())
    if entry.name not in FREE | MOVED | SIDE_BY_SIDE | {"gromov", "replaceme", "unified"}:
        assert all(gone(one.plan) < gone(other.plan) for one, other in itertools.pairwise(found))
    assert all(f.weights or str(f.plan) in {c.notation for c in f.trace} for f in found)


def test_presets_differ_and_random_follows_the_seed_of_the_task() -> None:
    words = ("first", "last", "middle", "alternate")
    gone = {which: position(random_task(), drop=2, which=which).plan.dropped() for which in words}
    assert gone == {"first": (0, 1), "last": (2, 3), "middle": (1, 2), "alternate": (0, 2)}
    drawn = {seed: position(random_task(seed=seed), drop=2, which="random").plan.dropped() for seed in range(12)}
    assert set(drawn.values()) <= set(itertools.combinations(range(4), 2)) and len(set(drawn.values())) > 2


def test_progress_reaches_the_measure_and_the_search() -> None:
    for entry in (param.values[0] for param in METHODS):
        assert isinstance(entry, Entry)
        reports: list[Any] = []
        run(entry, random_task(progress=lambda *report, to=reports: to.append(report)), 1)
        assert bool(reports) == (entry.name not in DATA_FREE), entry.name


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
