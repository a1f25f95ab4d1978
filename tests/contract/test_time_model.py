"""The measured price of prefill and decode, and budgets in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.api.budget import counted_budget, measured_budget, priced
from shoal.api.prune import prune
from shoal.cli import app
from shoal.errors import UsageError
from shoal.evaluation import time_model as module
from shoal.evaluation.speed import Speed, VariantSpeed
from shoal.evaluation.stats import Spread
from shoal.evaluation.time_model import TimeModel, counts, fitted_time_model
from shoal.models.inspect import inspect
from shoal.plan import Plan, drop, parse_plan
from shoal.plan.steps import runs

from .families import tiny
from .planted import random_data

TIMES = {"attention": (0.03, 0.05), "mlp": (0.07, 0.02)}
"""Seconds of one part, for prefill and for decode; 0.1 seconds are fixed."""


def made_up(model: Any, plans: dict[str, Plan], weights: Any = None, **work: Any) -> Speed:
    """What a machine would say whose parts take `TIMES`."""

    def seconds(plan: Plan, phase: int) -> float:
        parts = [part for run in runs(plan.steps()) for part in TIMES if run.part in ("layer", part)]
        return 0.1 + math.fsum(TIMES[part][phase] for part in parts)

    variants = []
    for name, plan in plans.items():
        own = [Spread.of([seconds(plan, phase)]) for phase in (0, 1)]
        ratios = [Spread.of([seconds(plan, n) / seconds(plans["dense"], n)]) for n in (0, 1)]
        variants.append(VariantSpeed(name, *own, *ratios))
    return Speed(tuple(variants), "cpu", "float32", 1, 1, 8, 2, 1, 0, 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "timed", made_up)


@pytest.mark.parametrize(("phase", "fixed", "total"), [("prefill", 0.1, 0.5), ("decode", 0.1, 0.38)])
@pytest.mark.usefixtures("machine")
def test_the_times_of_the_parts_are_found(phase: Any, fixed: float, total: float) -> None:
    model = tiny("llama")
    times = fitted_time_model(model, phase)
    assert times.fixed == pytest.approx(fixed / total, abs=1e-3)
    assert times.error < 1e-3
    assert times.dense_ms == pytest.approx(1000 * total)
    whole = Plan.identity(inspect(model))
    assert times(whole) == pytest.approx(1, abs=1e-3)
    place = 0 if phase == "prefill" else 1
    for part in ("attention", "mlp"):
        saved = times(whole) - times(drop(whole, [1, 2], part=part))
        assert saved == pytest.approx(2 * TIMES[part][place] / total, abs=1e-3)


@pytest.mark.usefixtures("machine")
def test_each_kind_of_layer_has_times_of_its_own() -> None:
    for family in ("jamba", "nemotron_h", "gemma3_text"):
        times = fitted_time_model(tiny(family), "decode")
        kinds = {layer.kind for layer in inspect(tiny(family)).stack().layers}
        assert all(any(f" of {kind} " in name for name in times.parts) for kind in kinds)
        assert times.error < 0.02


def test_a_map_counts_by_its_flops() -> None:
    spec = inspect(tiny("llama"))
    whole = Plan.identity(spec)
    of_map = counts(parse_plan("0,~1,2-3", whole), spec)
    layer = spec.stack().layers[1]
    assert list(of_map.values()) == [pytest.approx(3 + 2 * 32**2 / layer.flops)] * 2


def test_a_real_time_model_measures_and_says_how_well_it_fits() -> None:
    model = tiny("llama")
    times = fitted_time_model(model, "decode", prompt=8, new=2, pairs=2)
    assert isinstance(times, TimeModel) and len(times.timed) == 4
    assert times.timed["dense"] == 1 and times.dense_ms > 0 and times.error >= 0
    assert times(Plan.identity(inspect(model))) == pytest.approx(1, abs=0.05)


@pytest.mark.usefixtures("machine")
def test_a_budget_of_time_is_met_by_prediction_and_measured_at_the_end() -> None:
    model = tiny("llama")
    budget = measured_budget("decode", 0.8, model)
    whole = Plan.identity(inspect(model))
    assert not budget.met(whole) and budget.met(drop(whole, [0, 3]))
    facts = priced(budget, drop(whole, [3]), model)
    assert facts["price"] == pytest.approx(facts["measured"], abs=2e-3)
    assert facts["unit"] == "decode" and facts["asked"] == 0.8 and facts["error"] < 1e-3


@pytest.mark.usefixtures("machine")
def test_prune_takes_a_budget_of_time_and_says_what_it_took() -> None:
    found = prune(tiny("llama"), method="sleb", budget="prefill=0.7", data=random_data(2, 12), writable=False)
    price = found.to_dict()["price"]
    assert price["price"] <= 0.7 and price["measured"] == pytest.approx(price["price"], abs=2e-3)
    counted = prune(tiny("llama"), method="sleb", budget="layers=0.75", data=random_data(2, 12), writable=False)
    assert counted.to_dict()["price"] == {"unit": "layers", "asked": 0.75, "price": 0.75}
    assert prune(tiny("llama"), plan="0-2", writable=False).to_dict()["price"] is None


def test_time_cannot_be_counted() -> None:
    spec = inspect(tiny("llama"))
    with pytest.raises(UsageError, match="a budget in decode is measured on the loaded model") as raised:
        counted_budget("decode", 0.8, spec)
    assert raised.value.code == "U560"


def test_a_model_of_one_layer_has_no_parts_to_tell_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "check", lambda plan, spec: ["no"])
    with pytest.raises(UsageError, match="times cannot be told apart; use a budget that is counted") as raised:
        fitted_time_model(tiny("llama"), "decode")
    assert raised.value.code == "U561"


def test_a_dry_run_cannot_time(tmp_path: Any) -> None:
    tiny("llama").save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["prune", str(tmp_path), "--budget", "decode=0.8", "--dry-run", "--json"])
    assert done.exit_code == 1 and "U560" in done.output
    done = CliRunner().invoke(app, ["prune", str(tmp_path), "--budget", "layers=0.75", "--dry-run", "--json"])
    assert json.loads(done.stdout)["would"].startswith("would remove 1 of 4 layers")


@pytest.mark.parametrize("kept", [False, True])
def test_a_search_that_is_stopped_says_how_to_go_on(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **options: Any) -> None:
        if options["journal"] is not None:
            options["journal"].write_text('{"journal": 1}\n{"plan": "0-2", "nll": 1.0}\n{"plan": "1-3", "nll": 2.0}\n')
        raise KeyboardInterrupt

    monkeypatch.setattr("shoal.api.prune.prune", stopped)
    tiny("llama").save_pretrained(tmp_path / "model")
    journal = ["--journal", str(tmp_path / "j")] if kept else []
    done = CliRunner().invoke(app, ["prune", str(tmp_path / "model"), "--drop", "1", *journal])
    assert done.exit_code == 130
    assert ("keeps what was found of 2 plans; the same command goes on" in done.stderr) is kept
    assert ("with --journal FILE" in done.stderr) is not kept
