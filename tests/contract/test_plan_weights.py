"""Plans with weights of their own: kept beside the plan, run live, written as a stock checkpoint, proved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shoal.errors import ShoalError, UsageError, WriteError
from shoal.executing.weights import FILE, load_weights, save_planned
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.models.stacks import find_stack
from shoal.plan import Plan, load_plan, parse_plan
from shoal.writing.folder import verify, write
from shoal.writing.proof_child import cached, distance, uncached
from shoal.writing.surgery import rewrite

from .families import tiny
from .planted import random_data

REPLACED = {"llama": "mlp.down_proj.weight", "gpt2": "mlp.c_proj.weight", "mixtral": "mlp.experts.down_proj"}


def replaced(family: str, text: str = "0-1,2:new,2:new,3") -> tuple[Any, Plan, dict[str, torch.Tensor]]:
    """A model, a plan that runs layer 2 twice with one other tensor, and that tensor."""
    model = tiny(family)
    plan = parse_plan(text, Plan.identity(inspect(model)))
    old = find_stack(model).layer(2).state_dict()[REPLACED[family]]
    return model, plan, {f"new.{REPLACED[family]}": old * 0.5 + 0.1}


@pytest.mark.parametrize("family", REPLACED)
@torch.no_grad()
def test_a_rewritten_model_computes_what_the_plan_with_its_weights_computes(family: str) -> None:
    model, plan, weights = replaced(family)
    ids = random_data(2, 12).ids
    before = model(input_ids=ids).logits
    with running(model, plan, weights):
        live = model(input_ids=ids).logits
    assert not torch.equal(live, before)
    made = rewrite(model, plan, weights=weights)
    assert torch.equal(made(input_ids=ids).logits, live)
    assert torch.equal(model(input_ids=ids).logits, before)
    storages = [p.data_ptr() for p in made.parameters()]
    assert len(storages) == len(set(storages)), "a checkpoint cannot share tensors between layers"


def test_a_written_folder_is_proved_with_its_weights_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    model, plan, weights = replaced("llama")
    loaded = Loaded(model, None, "tiny-llama")
    folder = tmp_path / "written"
    write(loaded, plan, folder, weights=weights | {"unused.weight": torch.zeros(3)}, prove=False)
    assert load_weights(folder).keys() == weights.keys()
    assert verify(folder, loaded).passed
    with torch.no_grad():
        ids = random_data(1, 8).ids
        made = AutoModelForCausalLM.from_pretrained(folder)
        with running(model, load_plan(folder), load_weights(folder)):
            assert torch.allclose(made(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    file = folder / "shoal" / FILE
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match="not the file that"):
        verify(folder, loaded)
    file.unlink()
    with pytest.raises(UsageError, match=r"U550: .*copy it there"):
        load_weights(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", REPLACED)
def test_a_folder_is_proved_with_its_weights_before_it_gets_its_name(family: str, tmp_path: Path) -> None:
    model, plan, weights = replaced(family)
    loaded = Loaded(model, None, "tiny")
    assert write(loaded, plan, tmp_path / "out", weights=weights).proof.passed


def test_a_plan_folder_keeps_only_the_tensors_that_the_plan_names(tmp_path: Path) -> None:
    model = tiny("llama")
    plan = parse_plan("0,~1-2,3", Plan.identity(inspect(model)))
    own = {"map-1-2.weight": torch.eye(32), "map-1-2.bias": torch.ones(32)}
    save_planned(plan, tmp_path / "p", own | {"map-1.weight": torch.eye(32)})
    assert load_plan(tmp_path / "p") == plan
    found = load_weights(tmp_path / "p" / "shoal" / "plan.json")
    assert found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)
    assert sorted(p.name for p in (tmp_path / "p" / "shoal").iterdir()) == ["plan.json", FILE]
    dropped = parse_plan("0,3", plan)
    save_planned(dropped, tmp_path / "q")
    assert load_weights(tmp_path / "q") == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="W280"):
        save_planned(plan, tmp_path / "file", own)


def test_a_hash_that_is_no_text_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    save_planned(parse_plan("0,3", Plan.identity(inspect(model))), tmp_path)
    file = tmp_path / "shoal" / "plan.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"weights": 3}))
    with pytest.raises(ShoalError, match="expected a hash"):
        load_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("new.mlp.down_proj.weight", (3, 3), r"is \[3, 3\] and the layer holds \[32, 64\]"),
        ("new.mlp.down.weight", (3, 3), "holds None there"),
        ("other.mlp.down_proj.weight", (32, 64), r"new\.\* are not given"),
    ],
)
def test_weights_that_do_not_fit_the_layer_are_not_written(name: str, shape: tuple[int, ...], why: str) -> None:
    model, plan, _ = replaced("llama")
    with pytest.raises(WriteError, match=f"W209: .*{why}"):
        rewrite(model, plan, weights={name: torch.zeros(shape)})


@torch.no_grad()
def test_a_map_hands_tokens_beyond_its_limit_on_as_they_are() -> None:
    model = tiny("llama")
    plan = parse_plan("0,~1-2,3", Plan.identity(inspect(model)))
    ids = random_data(1, 10).ids
    seen: list[torch.Tensor] = []
    hook = find_stack(model).layer(3).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for own in ({"weight": torch.eye(32) * 2}, {"scale": torch.full((32,), 2.0)}):
        mapped = {f"map-1-2.{name}": tensor for name, tensor in own.items()}
        seen.clear()
        with running(model, parse_plan("0,3", plan)):
            model(input_ids=ids)
        norms = seen[0].norm(dim=-1)[0]
        limit = norms.median()
        with running(model, plan, mapped | {"map-1-2.limit": limit[None]}):
            model(input_ids=ids)
        beyond = norms > limit
        assert 0 < int(beyond.sum()) < 10
        assert torch.equal(seen[1][0, beyond], seen[0][0, beyond])
        assert torch.allclose(seen[1][0, ~beyond], 2 * seen[0][0, ~beyond])
    hook.remove()
    with pytest.raises(ShoalError, match="P113"), running(model, plan, mapped | {"map-1-2.limit": torch.ones(2)}):
        pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@torch.no_grad()
def test_cached_decoding_of_a_limited_map_is_the_uncached_forward(family: str) -> None:
    """Which tokens are handed on depends on nothing but the token: no position, no cache, no padding."""
    model = tiny(family)
    plan = parse_plan("0,~1-2,3:new", Plan.identity(inspect(model)))
    ids = random_data(2, 12).ids
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    seen: list[torch.Tensor] = []
    hook = (
        find_stack(model)
        .layer(0)
        .register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    )
    model(input_ids=ids, attention_mask=mask)
    hook.remove()
    weights = {
        "map-1-2.weight": torch.eye(32) * 1.5,
        "map-1-2.limit": seen[0].norm(dim=-1).median()[None] + 1e-3,  # no token is at the limit itself
    }
    name = REPLACED.get(family, REPLACED["llama"])
    weights[f"new.{name}"] = find_stack(model).layer(3).state_dict()[name] * 0.5
    with running(model, plan, weights):
        whole, steps = uncached(model, ids, mask), cached(model, ids, mask)
    assert steps is not None
    assert distance(whole, steps, mask) < 1e-4
