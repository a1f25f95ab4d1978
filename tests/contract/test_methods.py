"""Published methods: planted answers for all of the registry, and each against what its paper says it does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from shoal.api.journal import journaled, mean_nll
from shoal.data import Data
from shoal.measures.angular_distance import angular_distance
from shoal.measures.block_influence import block_influence
from shoal.measures.loss_removed import loss_removed
from shoal.methods._task import Task
from shoal.methods.gromov import gromov
from shoal.methods.loss_one_shot import loss_one_shot
from shoal.methods.position import position
from shoal.methods.shortgpt import shortgpt
from shoal.methods.sleb import sleb
from shoal.models.inspect import inspect
from shoal.plan import Plan, check
from shoal.registry import Entry, entries
from shoal.scores import Found
from shoal.writing.surgery import rewrite

from .families import tiny
from .planted import PLANTED, own_text, planted, random_data

DATA_FREE = {"position"}
METHODS = [pytest.param(entry, id=entry.name) for entry in entries("methods").values()]
LOOKING = [param for param in METHODS if param.id not in DATA_FREE]


class Untouchable:
    """Stands for what a data-free method must not look at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"a data-free method looked at .{name}")


def task_of(model: Any, data: Data, **rest: Any) -> Task:
    spec = inspect(model)
    plan = Plan.identity(spec)
    return Task(
        model, data, plan, spec, lambda p: not check(p, spec), journaled(model, plan, batch=16), batch=16, **rest
    )


def random_task(**rest: Any) -> Task:
    return task_of(tiny("llama"), random_data(4, 16), **rest)


@pytest.mark.parametrize("family", tuple(PLANTED))
@pytest.mark.parametrize("entry", LOOKING)
def test_a_method_that_looks_removes_the_layer_that_does_nothing_first(entry: Entry, family: str) -> None:
    found = entry.load()(task_of(planted(family), own_text(family)), drop=1)
    assert found.plan.dropped() == (PLANTED[family],)
    assert found.trace[0].notation == str(found.plan)


@pytest.mark.parametrize("name", sorted(DATA_FREE))
def test_a_position_preset_looks_at_nothing(name: str) -> None:
    spec = inspect(tiny("llama"))
    nothing: Any = Untouchable()
    task = Task(nothing, nothing, Plan.identity(spec), nothing, lambda plan: True, nothing)
    assert entries("methods")[name].load()(task, drop=2).plan.dropped() == (2, 3)


@pytest.mark.parametrize("entry", METHODS)
def test_a_method_repeats_itself_and_is_nested_where_it_goes_layer_by_layer(entry: Entry) -> None:
    found = [entry.load()(random_task(), drop=number) for number in (1, 2, 3)]
    assert [len(f.plan.dropped()) for f in found] == [1, 2, 3]
    assert entry.load()(random_task(), drop=2) == found[1]
    if entry.name != "gromov":
        assert set(found[0].plan.dropped()) < set(found[1].plan.dropped()) < set(found[2].plan.dropped())
    assert all(f.trace[-1].notation == str(f.plan) for f in found)


def test_shortgpt_is_block_influence_in_one_shot() -> None:
    task = random_task()
    scores = block_influence(task.model, task.data, skip_first=3, batch=16)
    found = shortgpt(task, drop=2, skip_first=3)
    assert found.plan.dropped() == tuple(sorted(scores.order()[:2]))
    assert found.scores == scores


def test_loss_one_shot_is_the_loss_when_removed_in_one_shot() -> None:
    task = random_task()
    scores = loss_removed(task.model, task.data, batch=16)
    assert loss_one_shot(task, drop=2).plan.dropped() == tuple(sorted(scores.order()[:2]))


@pytest.mark.parametrize("tokens", ["last", "all"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_gromov_is_the_span_with_the_smallest_angle(tokens: Any, number: int) -> None:
    task = random_task()
    scores = angular_distance(task.model, task.data, span=number, tokens=tokens, batch=16)
    first = min(range(4 - number + 1), key=scores.values.__getitem__)
    found = gromov(task, drop=number, tokens=tokens)
    assert found.plan.dropped() == tuple(range(first, first + number))
    assert found.scores == scores


def test_sleb_is_greedy_on_the_loss_of_stock_models() -> None:
    task = random_task()
    gone: tuple[int, ...] = ()
    for _ in range(2):
        left = [layer for layer in range(4) if layer not in gone]
        losses = {layer: _loss_without(task, (*gone, layer)) for layer in left}
        gone += (min(losses, key=losses.__getitem__),)
    found: Found = sleb(task, drop=2)
    assert found.plan.dropped() == tuple(sorted(gone))
    assert found.trace[-1].score == pytest.approx(_loss_without(task, gone), rel=1e-5)


def _loss_without(task: Task, gone: tuple[int, ...]) -> float:
    plan = Plan.identity(task.spec).with_steps(tuple(s for i, s in enumerate(task.plan.steps()) if i not in gone))
    return mean_nll(rewrite(task.model, plan), task.data, batch=16)


def test_sleb_evaluates_no_plan_twice() -> None:
    task = random_task()
    evaluated: list[str] = []
    real = task.objective(task.data)

    def counting(data: Data) -> Any:
        return lambda plan: evaluated.append(str(plan)) or real(plan)

    sleb(Task(task.model, task.data, task.plan, task.spec, task.legal, counting), drop=3)
    assert len(evaluated) == len(set(evaluated)) == 4 + 3 + 2


def test_presets_differ_and_random_follows_the_seed_of_the_task() -> None:
    words = ("first", "last", "middle", "alternate")
    gone = {which: position(random_task(), drop=2, which=which).plan.dropped() for which in words}
    assert gone == {"first": (0, 1), "last": (2, 3), "middle": (1, 2), "alternate": (0, 2)}
    drawn = {seed: position(random_task(seed=seed), drop=2, which="random").plan.dropped() for seed in range(12)}
    assert set(drawn.values()) <= set(itertools.combinations(range(4), 2)) and len(set(drawn.values())) > 2


def test_progress_reaches_the_measure_and_the_search() -> None:
    for entry in entries("methods").values():
        reports: list[Any] = []
        entry.load()(random_task(progress=lambda *report, to=reports: to.append(report)), drop=1)
        assert bool(reports) == (entry.name not in DATA_FREE)
