"""A plan is taken as people give it: a Plan, notation, or the place of a plan.json, by every public function."""

from __future__ import annotations

import inspect as python_inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shoal
from shoal.api.bench_policy import bench_policy
from shoal.api.calibrate import calibrate
from shoal.api.fit_exits import fit_exits
from shoal.errors import PlanError, ShoalError
from shoal.executing.bind import bind
from shoal.executing.weights import save_planned
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.plan import Plan, parse_plan
from shoal.writing.stream import stream

from .families import tiny
from .live_models import logits, own
from .test_api import folder  # noqa: F401

TEXT = "0-2,4"


def logits_of(model: Any, plan: Any) -> list[float]:
    with shoal.running(model, plan):
        return logits(model).flatten().tolist()


def applied(loaded: Loaded, plan: Any) -> str:
    handle = shoal.apply(loaded, plan)
    handle.restore()
    return str(handle.plan)


def written(model: Loaded, plan: Any, place: Path) -> str:
    return str(shoal.load_plan(shoal.write(model, plan, place, prove=False, overwrite=True).folder))


USES: dict[str, Callable[[Loaded, Any, Path], Any]] = {
    "running": lambda m, plan, _: logits_of(m.model, plan),
    "apply to what load gives": lambda m, plan, _: applied(m, plan),
    "bind": lambda m, plan, _: str(bind(m.model, plan).plan),
    "check": lambda m, plan, _: shoal.check(plan, inspect(m.model)),
    "cost": lambda m, plan, _: shoal.cost(plan, inspect(m.model)),
    "show": lambda m, plan, _: shoal.show(plan, inspect(m.model))["strips"],
    "diff": lambda m, plan, _: shoal.diff(Plan.identity(inspect(m.model)), plan),
    "diff the other way": lambda m, plan, _: shoal.diff(plan, Plan.identity(inspect(m.model))),
    "rewrite": lambda m, plan, _: shoal.rewrite(m.model, plan).config.num_hidden_layers,
    "write": lambda m, plan, place: written(m, plan, place / "out"),
    "write a folder": lambda m, plan, place: written(m.source, plan, place / "out"),  # type: ignore[arg-type]
    "stream": lambda m, plan, place: str(stream(m.source, plan, place / "streamed", overwrite=True).folder),
    "prune": lambda m, plan, _: str(shoal.prune(m, plan=plan).plan),
    "bench": lambda m, plan, _: len(shoal.bench(m, plan=plan, prompt=4, new=2, pairs=1).memory),
    "generate": lambda m, plan, _: shoal.generate(m, "a", plan=plan, max_new_tokens=3).text,
}


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:  # noqa: F811
    return shoal.load(folder)


@pytest.fixture(scope="module")
def given(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    plan = parse_plan(TEXT, Plan.identity(loaded.opened.spec))
    place = save_planned(plan, tmp_path_factory.mktemp("planned"))
    return {"plan": plan, "notation": TEXT, "file": str(place / "shoal" / "plan.json"), "folder": place}


@pytest.mark.parametrize("use", USES)
def test_every_function_takes_a_plan_as_people_give_it(
    loaded: Loaded, given: dict[str, Any], tmp_path: Path, use: str
) -> None:
    expected = USES[use](loaded, given["plan"], tmp_path)
    for how in ("notation", "file", "folder"):
        assert USES[use](loaded, given[how], tmp_path) == expected, how


def test_a_model_under_a_plan_is_not_written(loaded: Loaded, tmp_path: Path) -> None:
    with shoal.running(loaded, TEXT), pytest.raises(PlanError, match="P122"):
        shoal.write(loaded, "0-3", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_weights_beside_a_plan_are_taken_with_it(tmp_path: Path) -> None:
    model = own("llama")
    weights = {"map-1-2.weight": torch.eye(32) * 1.5}
    place = save_planned(parse_plan("0,~1-2,3", Plan.identity(inspect(model))), tmp_path, weights)
    with shoal.running(model, "0,~1-2,3", weights):
        expected = logits(model)
    for plan in (place, str(place), place / "shoal" / "plan.json"):
        with shoal.running(model, plan):
            assert torch.equal(logits(model), expected)


def test_every_public_function_says_that_it_takes_one() -> None:
    """The kind: a function with a plan that looks for its attributes at once."""
    public = [getattr(shoal, name) for name in shoal.__all__]
    asked = [bind, bench_policy, calibrate, fit_exits, stream, *filter(callable, public)]
    found = {
        function.__name__: str(python_inspect.signature(function).parameters[name].annotation)
        for function in asked
        if not isinstance(function, type)
        for name in ("plan", "before", "after")
        if name in python_inspect.signature(function).parameters
    }
    assert len(found) > 12
    assert {name for name, annotation in found.items() if "Given" not in annotation} == {"save_plan"}


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda m: shoal.running(m, [0, 1]).__enter__(), "U656"),
        (lambda m: shoal.write(m, None, "nowhere"), "U656"),
        (lambda _: shoal.diff("0-1", "0-2"), "U656"),
        (lambda _: shoal.show("0-1"), "U656"),
        (lambda _: shoal.save_plan("0-1", "plan.json"), "U656"),
        (lambda m: shoal.running(m, "0-1,x").__enter__(), "N001"),
        (lambda m: shoal.running(m, "no/plan.json").__enter__(), "N001"),
        (lambda m: shoal.rewrite(m, Path("nowhere")), "N001"),
    ],
)
def test_what_is_no_plan_is_said_so(call: Callable[[Any], Any], code: str) -> None:
    with pytest.raises(ShoalError) as caught:
        call(tiny("llama"))
    assert caught.value.code == code
