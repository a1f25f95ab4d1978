"""Lenses for exits: the fit against a naive one, a plan that carries them, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.api.fit_exits import FittedExits, fit_exits
from shoal.data import Data, DataInfo
from shoal.deciding.gating import exits_of
from shoal.deciding.policy_text import make_policy
from shoal.errors import ShoalError
from shoal.executing.weights import load_weights, save_planned
from shoal.fitting.lens import SINK, fit_lenses
from shoal.fitting.normal import RIDGES
from shoal.fitting.probe import regressed
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.models.stacks import find_stack
from shoal.plan import Plan, parse_plan

from .families import VOCAB, tiny
from .test_api import folder  # noqa: F401
from .test_cli import model, shoal  # noqa: F401


def _data(rows: int = 6, length: int = 14) -> Data:
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))
    return Data(ids, None, DataInfo("own", "whole", length, rows, length, "none", ids.numel(), "0", None))


def _gated(found: Any, layers: str, head: str = "lens", plan: str | None = None) -> Plan:
    """The plan with exits behind `layers`."""
    spec = inspect(found)
    base = Plan.identity(spec) if plan is None else parse_plan(plan, Plan.identity(spec))
    return make_policy(f"exit:confidence=1,layers={layers},head={head}", base, spec).plan


def _states(found: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What comes out of every layer, [batch, tokens, hidden]."""
    out: dict[int, torch.Tensor] = {}
    stack = find_stack(found)

    def keep(index: int) -> Any:
        return lambda _, __, o: out.__setitem__(index, o[0] if isinstance(o, tuple) else o)

    handles = [stack.layer(i).register_forward_hook(keep(i)) for i in range(stack.depth)]
    with torch.no_grad():
        found(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [out[i] for i in range(stack.depth)]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_lens_is_the_weighted_ridge_regression_that_the_held_sequences_like_best(family: str, batch: int) -> None:
    found, data = tiny(family), _data(rows=9)
    lens = fit_lenses(found, _gated(found, "0-1", head="x"), None, data, batch=batch)
    states = _states(found, data.ids)
    hidden = states[0].shape[-1]
    pieces: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {True: [], False: []}
    for row in range(len(data)):
        x, y = states[1][row, 1:].double(), states[-1][row, 1:].double()
        assert y.norm(dim=-1).max() < SINK * y.norm(dim=-1).median()
        w = 1 / y.norm(dim=-1, keepdim=True)
        pieces[row % 4 == 3].append((torch.cat([x, torch.ones(len(x), 1)], -1) * w, y * w))
    (x, y), (held_x, held_y) = (
        tuple(torch.cat([one[n] for one in pieces[held]]) for n in (0, 1)) for held in (False, True)
    )
    eye = torch.eye(hidden, hidden + 1, dtype=torch.float64)

    def solved(ridge: float) -> torch.Tensor:
        strength = ridge * (x.T @ x).diagonal().mean()
        # least squares over the tokens and, below them, over the wish to be the identity
        rows = torch.cat([x, strength.sqrt() * torch.eye(hidden + 1, dtype=torch.float64)])
        return torch.linalg.lstsq(rows, torch.cat([y, strength.sqrt() * eye.T])).solution.T

    best = min((solved(ridge) for ridge in RIDGES), key=lambda w: float((held_x @ w.T - held_y).square().sum()))
    torch.testing.assert_close(lens["x-1.lens"].double(), best[:, :-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lens["x-1.lens_bias"].double(), best[:, -1], atol=1e-4, rtol=1e-4)


def test_layers_that_do_nothing_get_the_identity() -> None:
    found = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        for layer in find_stack(found).layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    lens = fit_lenses(found, _gated(found, "1"), None, _data())
    torch.testing.assert_close(lens["lens-1.lens"], torch.eye(32), atol=1e-5, rtol=0)
    assert lens["lens-1.lens_bias"].abs().max() < 1e-5


def test_the_target_is_the_state_that_the_head_reads() -> None:
    """Behind the last step of the plan: here a map that turns the state round."""
    found, data = tiny("llama"), _data()
    weights = {"m.scale": torch.full((32,), -2.0)}
    lens = fit_lenses(found, _gated(found, "1", plan="0-1,~2-3:m"), weights, data)
    torch.testing.assert_close(lens["lens-1.lens"], -2 * torch.eye(32), atol=1e-2, rtol=0)


def test_several_residual_streams_are_refused() -> None:
    found = tiny("gemma3n_text", "eager")
    with pytest.raises(ShoalError, match="U622"):
        fit_lenses(found, _gated(found, "1"), None, _data())


def test_padding_does_not_count() -> None:
    found, data = tiny("llama"), _data()
    longer = torch.cat([torch.full((len(data), 3), 5), data.ids], -1)
    mask = torch.cat([torch.zeros(len(data), 3, dtype=torch.long), torch.ones_like(data.ids)], -1)
    padded = Data(longer, mask, data.info)
    plan = _gated(found, "1")
    plain, with_padding = fit_lenses(found, plan, None, data), fit_lenses(found, plan, None, padded, batch=2)
    torch.testing.assert_close(with_padding, plain, atol=1e-3, rtol=1e-3)


def test_exits_with_lenses_travel_in_a_plan_folder(tmp_path: Path) -> None:
    found, data = tiny("llama"), _data(rows=10)
    spec = inspect(found)
    made = fit_exits(Loaded(found, None, "own"), "exit:layers=0-2,fill=defer", data=data)
    assert isinstance(made, FittedExits)
    assert made.sequences == 2
    assert [row["layer"] for row in made.rows] == [0, 1, 2]
    assert set(exits_of(made.plan).values()) == {0, 1, 2}
    save_planned(made.plan, tmp_path, made.weights)
    weights = load_weights(tmp_path)
    assert set(weights) == {
        f"lens-{n}.{part}" for n in range(3) for part in ("lens", "lens_bias", "probe", "probe_bias")
    }
    states = _states(found, data.ids)
    with torch.no_grad():
        read = torch.nn.functional.linear(states[1], weights["lens-1.lens"], weights["lens-1.lens_bias"])
        want = found.lm_head(found.model.norm(read))
    policy = make_policy("exit:after=1,prefill=true", made.plan, spec)
    with torch.no_grad(), running(found, made.plan, weights, policy=policy) as handle:
        torch.testing.assert_close(found(data.ids).logits, want, atol=1e-4, rtol=1e-4)
        assert handle.trace.to_dict()["counts"]["mean_depth"] == 2
    with (
        torch.no_grad(),
        running(found, made.plan, weights, policy="exit:confidence=0,layers=2,prefill=true") as handle,
    ):
        found(data.ids)
        assert handle.trace.to_dict()["counts"]["mean_depth"] == 3  # the exits behind 0 and 1 are not asked
    with pytest.raises(ShoalError, match="none behind 3"):
        make_policy("exit:after=3", made.plan, spec)


def test_a_probe_finds_the_direction_that_tells_right_from_wrong() -> None:
    generator = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(4000, 24, generator=generator, dtype=torch.float64), torch.linspace(-1, 1, 24).double()
    y = (torch.rand(4000, generator=generator) < (3 * x @ wanted - 1).sigmoid()).double()
    weight, bias = regressed(x * 7 + 5, y)  # neither scale nor place of the inputs matters
    assert torch.cosine_similarity(weight, wanted, dim=0) > 0.98
    # three standard errors of the intercept of 3000 answers; the draw is the same on every machine
    assert float(bias + 5 * weight.sum()) == pytest.approx(-1, abs=0.3)
    for answer in (0.0, 1.0):  # an exit that is never right, or always
        weight, bias = regressed(x, torch.full((4000,), answer, dtype=torch.float64))
        assert abs(float((x[0] @ weight + bias).sigmoid()) - answer) < 0.01


def test_tokens_leave_where_the_probe_says_so_and_no_head_is_asked() -> None:
    found, data = tiny("llama"), _data(rows=10)
    spec = inspect(found)
    plan = make_policy("exit:confidence=1,layers=0-2,head=lens", Plan.identity(spec), spec).plan
    generator = torch.Generator().manual_seed(1)
    weights = {f"lens-{n}.probe": torch.randn(32, generator=generator) / 4 for n in range(3)}
    weights |= {f"lens-{n}.probe_bias": torch.tensor([0.1 * n]) for n in range(3)}
    told = {}
    for layer, states in enumerate(_states(found, data.ids)[:3]):
        unit = states / states.square().mean(-1, keepdim=True).sqrt()
        told[layer] = (unit @ weights[f"lens-{layer}.probe"] + weights[f"lens-{layer}.probe_bias"]).sigmoid()
    threshold = 0.7
    left = torch.full(data.ids.shape, 4.0)
    for layer in (2, 1, 0):
        left[told[layer] >= threshold] = layer + 1
    assert len(left.unique()) == 4
    policy = make_policy(f"exit:confidence={threshold},by=probe,prefill=true", plan, spec)
    with torch.no_grad(), running(found, plan, weights, policy=policy) as handle:
        found(data.ids, use_cache=False)
        assert torch.equal(torch.tensor(handle.trace.depths), left)
        assert handle.trace.counts.heads == 0
    bare = make_policy("exit:confidence=0.5,by=probe", Plan.identity(spec), spec)
    with pytest.raises(ShoalError, match="U623"), running(found, Plan.identity(spec), policy=bare):
        pass


def test_the_verb_and_what_is_calibrated_on_it(model: str, tmp_path: Path) -> None:  # noqa: F811
    plan, file, kept = tmp_path / "plan", tmp_path / "policy.json", tmp_path / "exits.safetensors"
    words = ["--length", "12", "--limit", "60"]
    said = json.loads(shoal("fit-exits", model, "--policy", "exit:layers=1-3", *words, "--output", str(plan), "--json"))
    assert said["output"] == str(plan)
    assert "lens-1" in said["plan"]
    assert "sequences held out" in shoal("fit-exits", model, "--policy", "exit:layers=1-3", *words)
    chosen = ["--policy", "exit:by=probe", "--target", "agreement=0.9", "--prompt", "4"]
    assert "U623" in shoal("calibrate", model, *words, *chosen, code=1)
    chosen += ["--plan", str(plan), "--features", str(kept)]
    shoal("calibrate", model, *words, *chosen, "--output", str(file))
    shoal("generate", model, "abc", "--plan", str(plan), "--policy", str(file), "--max-new-tokens", "3")
    timed = ["--policy", str(file), "--new", "4", "--pairs", "1", "--json"]
    assert json.loads(shoal("bench", model, "--plan", str(plan), *timed))["looks"] == 0
    # other lenses than those that the thresholds were chosen for, and exits recorded through the old ones
    shoal("fit-exits", model, "--policy", "exit:layers=1-3", "--length", "16", "--limit", "20", "--output", str(plan))
    refused = shoal("generate", model, "abc", "--plan", str(plan), "--policy", str(file), code=1)
    assert "U605" in refused
    assert "other lenses" in refused
    assert "D473" in shoal("calibrate", model, *words, *chosen, code=1)


def test_a_classifier_by_the_same_verb(model: str) -> None:  # noqa: F811
    said = shoal("fit-exits", model, "--what", "adainfer", "--policy", "exit:layers=1-3", "--limit", "20", "--json")
    assert json.loads(said)["policy"].startswith("adainfer:gap=")
    assert "U626" in shoal("fit-exits", model, "--what", "adainfer", "--output", "x", code=1)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"policy": "skip:late=1"}, "U603"),
        ({"policy": "exit:confidence=0.5"}, "U603"),
        ({"limit": 1}, "U625"),
        ({"length": 2}, "D471"),
        ({"what": "adainfer", "plan": "0-1,3"}, "U621"),
    ],
)
def test_refused_by_name(options: dict[str, Any], code: str) -> None:
    with pytest.raises(ShoalError) as refused:
        fit_exits(Loaded(tiny("llama"), None, "own"), data=_data(), **options)
    assert refused.value.code == code


def test_a_plan_with_exits_is_refused() -> None:
    found = tiny("llama")
    spec = inspect(found)
    gated = make_policy("exit:confidence=1", Plan.identity(spec), spec).plan
    with pytest.raises(ShoalError, match="U621"):
        fit_exits(Loaded(found, None, "own"), plan=gated, data=_data())
