"""One price for one plan: what prune, compare, show, doctor and the page say of it is the same figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.api import harness as harness_module
from shoal.api.budget import counted_budget, priced
from shoal.api.doctor import doctor
from shoal.api.inspection import show
from shoal.api.prune import prune
from shoal.api.pruned import Pruned
from shoal.api.publish import cost_rows
from shoal.api.study import Cell, Protocol
from shoal.errors import UsageError
from shoal.evaluation.time_model import TimeModel, counts
from shoal.executing.weights import save_planned
from shoal.models.inspect import inspect
from shoal.models.load import Loaded, load
from shoal.plan import Plan, cost, drop, parse_plan
from shoal.scores import Budget
from shoal.search.dynamic_programming import dynamic_programming

from .families import tiny
from .method_tasks import METHODS, TASK, filled
from .shares import every
from .test_api import model_folder

PROTOCOL = Protocol(length=16, limit=4, window=16, windows=1, new_tokens=0, pairs=0, compared=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    (place / "task.jsonl").write_text(TASK)
    return model_folder(place)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return load(folder, device="cpu")


@pytest.mark.parametrize("name", every(3, METHODS))
def test_prune_and_compare_report_the_same_price_for_the_same_plan(
    name: str, loaded: Loaded, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Pruned] = []

    def spied(*args: Any, **options: Any) -> Pruned:
        said.append(prune(*args, **options))
        return said[-1]

    monkeypatch.setattr(harness_module, "prune", spied)
    own = METHODS[name]
    given = filled({**own.needed, **own.new_tensors}, folder / "task.jsonl")
    options = ";".join(f"{key}={value}" for key, value in given.items())
    harness = harness_module.Harness.of(loaded, PROTOCOL, tmp_path)
    budget = own.budget or "params=0.8"
    unit, _, share = budget.partition("=")
    row = harness.row(Cell(f"{name}:{options}" if options else name, budget, 0))
    if own.budget is None:
        assert not said and row["error"].startswith("U523"), row
        return
    found, result = said[0], row["result"]
    assert found.price is not None
    params = found.after.written_params / found.before.written_params
    assert result["price"] == found.price["price"] == {**result, "params": params}[unit] <= float(share)
    assert result["params"] == found.after.written_params
    assert result["flops"] == found.after.prefill_flops / found.before.prefill_flops
    assert result["kv"] == found.after.kv_per_token / found.before.kv_per_token
    brought = prune(loaded, plan=found.plan, weights=found.found.weights, writable=False)
    assert brought.after == found.after, "the same plan, brought by the user"
    assert show(found.plan, found.spec, found.found.weights)["cost"]["plan"] == found.after.to_dict()


MAPS = {
    "scale": {"m.scale": (32,)},
    "low rank": {"m.down": (2, 32), "m.up": (32, 2), "m.bias": (32,)},
    "net": {"m.gate": (2, 32), "m.down": (2, 32), "m.up": (32, 2)},
    "full": {"m.weight": (32, 32), "m.bias": (32,), "m.limit": (1,)},
}


@pytest.fixture(params=list(MAPS))
def planned(request: pytest.FixtureRequest, loaded: Loaded) -> tuple[Plan, dict[str, torch.Tensor]]:
    plan = parse_plan("0-1,~2:m,3-4", Plan.identity(inspect(loaded.model)))
    return plan, {name: torch.zeros(shape) for name, shape in MAPS[request.param].items()}


@pytest.mark.parametrize("unit", ["params", "flops", "layers", "kv"])
def test_a_budget_prices_a_map_by_its_tensors(unit: Any, loaded: Loaded, planned: Any) -> None:
    plan, weights = planned
    spec = inspect(loaded.model)
    whole, after = (
        cost(one, spec, weights={name: tuple(t.shape) for name, t in weights.items()})
        for one in (Plan.identity(spec), plan)
    )
    share = {
        "params": after.written_params / whole.written_params,
        "flops": after.prefill_flops / whole.prefill_flops,
        "layers": 4 / 5,
        "kv": 4 / 5,
    }[unit]
    assert priced(counted_budget(unit, 0.9, spec), plan, loaded.model, weights=weights)["price"] == share
    assert counted_budget(unit, share, spec).met(plan, weights)
    assert not counted_budget(unit, share - 1e-6, spec).met(plan, weights)


def test_every_verb_gives_a_plan_in_a_folder_the_same_cost(
    loaded: Loaded, folder: Path, planned: Any, tmp_path: Path
) -> None:
    plan, weights = planned
    place = save_planned(plan, tmp_path / "plan", weights)
    given = prune(loaded, plan=plan, weights=weights, writable=False)
    assert not given.after.assumed
    seen = doctor(folder, plan=str(place)).to_dict()["plan"]["after"]
    assert (seen["parameters"], seen["prefill_flops"]) == (given.after.written_params, given.after.prefill_flops)
    assert seen["decode_flops"] == given.after.decode_flops
    rows = {row["name"]: row["pruned"] for row in cost_rows(given)}
    assert rows["parameters"] == given.after.written_params
    assert show(plan, given.spec, weights)["cost"]["plan"] == json.loads(json.dumps(given.after.to_dict()))


def test_a_cost_says_which_shapes_it_had_to_assume(loaded: Loaded) -> None:
    spec = inspect(loaded.model)
    plan = parse_plan("0-1,~2:m,3:n,4", Plan.identity(spec))
    assert cost(plan, spec).assumed == ("m", "n")
    assert cost(plan, spec).to_dict()["assumed"] == ("m", "n")
    assert cost(plan, spec, weights={"m.scale": (32,)}).assumed == ("n",)
    whole = cost(plan, spec, weights={"m.scale": (32,), "n.mlp.up_proj.weight": (64, 32)})
    assert whole.assumed == () and "assumed" not in whole.to_dict()


def test_a_clock_counts_a_map_by_its_tensors() -> None:
    spec = inspect(tiny("llama"))
    whole = Plan.identity(spec)
    plan, gone = parse_plan("0,~1:m,2-3", whole), drop(whole, [1])
    assert counts(plan, spec, {"m.scale": (32,)}) == counts(gone, spec)
    assert counts(plan, spec, {"m.weight": (32, 32)}) == counts(plan, spec)
    parts = dict.fromkeys(counts(whole, spec), 0.1)
    budget = Budget("decode", 0.81, TimeModel("decode", spec, 0.2, parts, 0.0, {}, 1.0))
    assert budget.price_of(plan, {"m.scale": (32,)}) == budget.price_of(gone) == pytest.approx(0.8)
    assert budget.met(plan, {"m.scale": (32,)}) and not budget.met(plan), "a full map is dearer"


def test_a_price_of_the_users_own_is_asked_as_it_is() -> None:
    plan = Plan.identity(inspect(tiny("llama")))
    own = Budget("params", 0.5, lambda plan: 0.25)
    assert own.price_of(plan, {"m.scale": (32,)}) == 0.25 and own.met(plan, {"m.scale": (32,)})


def test_no_search_returns_a_plan_beyond_its_budget() -> None:
    """Two layers together save less than the sum of what each saves, as shared storage does."""
    plan = Plan.identity(inspect(tiny("llama")))

    def price(made: Plan) -> float:
        gone = len(made.dropped())
        return 1.0 if not gone else 0.75 - 0.01 * (gone - 1)

    budget = Budget("params", 0.5, price)
    with pytest.raises(UsageError, match=r"costs 0\.740.*use milp") as raised:
        dynamic_programming(
            plan, objective=lambda made: float(len(made.dropped())), budget=budget, legal=lambda made: True
        )
    assert raised.value.code == "U548"
