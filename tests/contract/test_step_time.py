"""What the byte count predicts: planted rates give planted times, and a probe of this machine gives plausible ones."""

from __future__ import annotations

import pytest
import torch

from shoal.evaluation import step_time
from shoal.evaluation.step_time import _of, bandwidth, fitted_step_time, step_time_of
from shoal.models.inspect import inspect
from shoal.plan import Plan, Shape
from shoal.plan.moved import moved

from .families import tiny

RATES = {2**20: 40.0, 2**21: 40.0, 2**22: 38.0, 2**23: 12.0, 2**24: 10.0}


def test_the_cache_is_where_the_rate_falls() -> None:
    found = _of(RATES)
    assert (found.far, found.near, found.cache_bytes) == (10.0, 40.0, 2**22)
    assert _of(dict.fromkeys(RATES, 10.0)).cache_bytes == 0


def test_planted_times_come_back() -> None:
    """A machine that reads 10 bytes a second and takes 3 s for every part."""
    spec, shape = inspect(tiny("llama")), Shape(context=16)
    rates = _of(dict.fromkeys(RATES, 10.0))
    whole = moved("0-3", spec, shape)
    model = step_time_of(rates, whole.total / 10 + 8 * 3.0, spec, shape, "float32")
    assert model.per_part == pytest.approx(3.0)
    assert model.seconds("0-3") == pytest.approx(model.dense)
    assert model.seconds("0-2") == pytest.approx(moved("0-2", spec, shape).total / 10 + 6 * 3.0)
    assert model.share("0-2") < model.share("0-2,3a") < 1 == model.share(Plan.identity(spec))
    assert model.share("0x4") == pytest.approx(1), "a loop saves nothing where nothing stays in the cache"


def test_what_stays_in_the_cache_pays() -> None:
    spec, shape = inspect(tiny("llama")), Shape(context=16)
    model = step_time_of(_of(RATES), 1e6, spec, shape, "float32")
    assert model.moved("0-3").near == moved("0-3", spec, shape).total, "a tiny model stays in it whole"
    assert model.without_cache().moved("0-3").near == 0


def test_this_machine_has_a_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "SIZES", (2**20, 2**22))
    monkeypatch.setattr(step_time, "_READ", 2**23)
    found = bandwidth(columns=256)
    assert set(found.rates) == {2**20, 2**22}
    assert 1e7 < found.far <= found.near < 1e13
    assert found.to_dict()["cache_bytes"] == found.cache_bytes
    model = fitted_step_time(tiny("llama"), context=8, new=2, pairs=1)
    assert model.dense > 0 and model.dtype == "float32" and model.shape.context == 9
    assert torch.is_grad_enabled()
