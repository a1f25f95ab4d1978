"""Leave or stay: extremes of the weight, a planted case, and the record against the running policy."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.api.fit_exits import FittedExits, fit_exits
from shoal.deciding.policy_text import make_policy
from shoal.errors import ShoalError
from shoal.evaluation.exits import live_losses, record_exits
from shoal.fitting.leave_or_stay import fit_leave_or_stay
from shoal.live import running
from shoal.models.load import Loaded

from .families import tiny
from .test_api import folder  # noqa: F401
from .test_cli import model, shoal  # noqa: F401
from .test_lens import _data, _gated, _states

LEAVES = "exit:confidence=0.5,by=probe,prefill=true,fill=defer"


def _fitted(found: Any, **options: Any) -> FittedExits:
    made = fit_exits(Loaded(found, None, "own"), "exit:layers=0-2,fill=defer", what="leave-or-stay", **options)
    assert isinstance(made, FittedExits)
    return made


@pytest.mark.parametrize(("tradeoff", "layers", "agreement"), [(1.0, 4.0, 1.0), (0.0, 1.0, None)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_extremes(family: str, tradeoff: float, layers: float, agreement: float | None) -> None:
    """When only agreement counts nobody leaves; when only layers do, all leave at the first exit."""
    found, data = tiny(family), _data(rows=10)
    made = _fitted(found, tradeoff=tradeoff, data=data)
    assert made.decided is not None
    assert made.decided["layers"] == layers
    assert agreement is None or made.decided["agreement"] == agreement
    policy = make_policy(LEAVES, made.plan, Loaded(found, None, "own").opened.spec)
    with torch.no_grad(), running(found, made.plan, made.weights, policy=policy) as handle:
        found(data.ids, use_cache=False)
        assert (torch.tensor(handle.trace.depths)[:, 1:] == layers).all()


@pytest.mark.parametrize("tradeoff", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_the_record_is_what_the_running_policy_does(family: str, tradeoff: float) -> None:
    found, data = tiny(family), _data(rows=30)
    made = _fitted(found, tradeoff=tradeoff, data=data)
    assert made.decided is not None
    held = data.only(range(24, 30))
    policy = make_policy(LEAVES, made.plan, Loaded(found, None, "own").opened.spec)
    features = record_exits(found, made.plan, held, prompt=1, weights=made.weights)
    lost, layers = live_losses(found, policy, made.plan, held, features, weights=made.weights)
    assert layers == pytest.approx(made.decided["layers"], abs=1e-9)
    assert 1 - lost.mean() == pytest.approx(made.decided["agreement"], abs=1e-9)
    assert made.decided["cost"] == pytest.approx(tradeoff * lost.mean() + (1 - tradeoff) * layers / 4)


def test_the_last_exit_is_decided_first_and_the_others_know_what_it_does() -> None:
    """Each exit's labels by hand, from what the exits behind it decide."""
    found, data, w = tiny("llama"), _data(rows=20), 0.6
    plan, eye = _gated(found, "0-2"), torch.eye(32)
    plain = {f"lens-{n}.lens": eye for n in range(3)} | {f"lens-{n}.lens_bias": torch.zeros(32) for n in range(3)}
    weights = fit_leave_or_stay(found, plan, plain, data, tradeoff=w)
    units = [one / one.square().mean(-1, keepdim=True).sqrt() for one in _states(found, data.ids)]
    with torch.no_grad():
        said = [found.lm_head(found.model.norm(one)).argmax(-1)[:, 1:] for one in _states(found, data.ids)]
    right = [(one == said[-1]).double() for one in said]
    value = torch.full_like(right[0], 1 - w)
    for layer in (2, 1, 0):
        cost = w * (1 - right[layer]) + (1 - w) * (layer + 1) / 4
        line = units[layer] @ weights[f"lens-{layer}.probe"] + weights[f"lens-{layer}.probe_bias"]
        leaves = (line >= 0)[:, 1:]
        # what it decides costs no more than the better of the two answers that are the same for all
        took = torch.where(leaves, cost, value).mean()
        assert took <= min(cost.mean(), value.mean()) + 1e-9
        value = torch.where(leaves, cost, value)


def test_planted_tokens_that_need_no_more_layers_leave_and_others_stay() -> None:
    """Layers from 1 on change only tokens whose first coordinate is above 0, and there they change the answer."""
    found, data = copy.deepcopy(tiny("llama")), _data(rows=60)
    with torch.no_grad():
        for layer in found.model.layers[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        even = torch.arange(found.config.vocab_size) % 2 == 0
        found.model.embed_tokens.weight[even, 0] = 3.0
        found.model.embed_tokens.weight[~even, 0] = -3.0
        mlp = found.model.layers[3].mlp
        # the gate opens for a positive first coordinate alone, and what it lets through turns the state round
        mlp.gate_proj.weight.zero_()
        mlp.gate_proj.weight[:, 0] = 20.0
        mlp.up_proj.weight.zero_()
        mlp.up_proj.weight[:, 0] = 1.0
        mlp.down_proj.weight[1] = 5.0
    made = _fitted(found, tradeoff=0.5, data=data)
    policy = make_policy(LEAVES, made.plan, Loaded(found, None, "own").opened.spec)
    with torch.no_grad(), running(found, made.plan, made.weights, policy=policy) as handle:
        found(data.ids, use_cache=False)
        depths = np.array(handle.trace.depths)[:, 1:]
    needs = (data.ids % 2 == 0).numpy()[:, 1:]
    assert (depths[~needs] == 1).mean() > 0.95
    assert (depths[needs] == 4).mean() > 0.95


def test_the_verb(model: str, tmp_path: Path) -> None:  # noqa: F811
    words = ["fit-exits", model, "--policy", "exit:layers=1-3,fill=defer", "--length", "12", "--limit", "40"]
    out = tmp_path / "plan"
    said = shoal(*words, "--what", "leave-or-stay", "--output", str(out))
    assert "leaving as it decides: agreement" in said
    assert "--policy exit:confidence=0.5,by=probe" in said
    shoal("generate", model, "abc", "--plan", str(out), "--policy", "exit:confidence=0.5,by=probe",
          "--max-new-tokens", "3")  # fmt: skip
    found = json.loads(shoal(*words, "--what", "leave-or-stay", "--tradeoff", "1", "--json"))
    assert found["decided"]["agreement"] == 1
    assert "U699" in shoal(*words, "--tradeoff", "0.5", code=1)
    assert "U699" in shoal(*words, "--what", "leave-or-stay", "--tradeoff", "2", code=1)


def test_a_weight_that_is_none() -> None:
    with pytest.raises(ShoalError, match="U699"):
        _fitted(tiny("llama"), tradeoff=-0.1, data=_data(rows=10))
