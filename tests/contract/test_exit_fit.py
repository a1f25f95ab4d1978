"""The classifier of adainfer: labels that are counted independently, and the optimum of what it minimises."""

from __future__ import annotations

import pytest
import torch

from shoal.errors import DataError
from shoal.fitting.exits import fit_adainfer, logistic
from shoal.live import running

from .families import tiny
from .planted import random_data


def test_known_weights_are_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 2, dtype=torch.float64, generator=generator)
    right = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    chance = torch.sigmoid(x @ right[:2] + right[2])
    y = (torch.rand(len(x), dtype=torch.float64, generator=generator) < chance).double()
    found = logistic(x, y, 0.0)
    assert (found - right).abs().max() < 0.1
    slope = torch.cat([x, torch.ones(len(x), 1)], -1).T @ (torch.sigmoid(x @ found[:2] + found[2]) - y) / len(y)
    assert slope.abs().max() < 1e-10


def test_the_labels_are_those_of_models_that_end_there() -> None:
    model, data = tiny("llama"), random_data(6, 20)
    found = fit_adainfer(model, data, [1, 2])
    agree = []
    for ids, _ in data.batches(1):
        with torch.no_grad():
            final = model(ids, use_cache=False).logits.argmax(-1)
            for plan in ("0-1", "0-2"):
                with running(model, plan):
                    agree.append(model(ids, use_cache=False).logits.argmax(-1)[:, 1:] == final[:, 1:])
    share = torch.cat(agree).double().mean().item()
    assert found.share == pytest.approx(share)
    assert found.exits == 2 * 6 * 19
    assert found.accuracy >= max(share, 1 - share) - 1e-9
    with running(model, "0-3", policy=found.policy) as handle:
        handle.prompt = 0
        model(data.ids[:1], use_cache=False)
        assert handle.policy is not None
        assert {step.layer for step in handle.plan.steps() if hasattr(step, "layer")} == {0, 1, 2, 3}


def test_exits_that_all_agree_are_no_data() -> None:
    model = tiny("llama")
    with pytest.raises(DataError, match="D414: all"):
        fit_adainfer(model, random_data(1, 3), [0], skip_first=2)
