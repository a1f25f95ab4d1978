"""Runs with the matrices of another layer: what they compute, what they cost, how they are written and refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from shoal.errors import PlanError, UsageError, WriteError
from shoal.live import apply, running
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Plan, cost, parse_plan
from shoal.writing.adapter import refuse_adapter
from shoal.writing.surgery import blueprint, rewrite

from .families import VOCAB, tiny
from .healing import learner_of
from .references import CLOSE, tied
from .shares import every
from .stream_folders import bases, content, streamed, written  # noqa: F401

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
FAMILIES = [
    "llama",
    "gpt2",
    "opt",
    "qwen2",
    "gemma2",
    "mixtral",
    "bloom",
    "olmo2",
    "stablelm",
    "phi3",
    "gptj",
]


@torch.no_grad()
def logits(model: Any, **more: Any) -> torch.Tensor:
    return model(input_ids=IDS, **more).logits


def own(family: str = "llama", attention: str = "sdpa") -> Any:
    return copy.deepcopy(tiny(family, attention))


@pytest.mark.parametrize("family", every(2, FAMILIES))
def test_a_tied_layer_keeps_its_norms_and_biases(family: str) -> None:
    """In place of matrices alone, each run of a tie in turn; afterwards the model is what it was, bit for bit."""
    model = own(family, "eager")
    for layer in range(4):  # norms and biases that tell which layer they belong to
        for parameter in find_stack(model).layer(layer).parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * (layer + 1)
    before = logits(model)
    with tied(model, 2, 0), tied(model, 3, 1):
        want = logits(model)
    with running(model, "0-1,2-3=0-1"):
        found = logits(model)
    assert torch.equal(logits(model), before)
    torch.testing.assert_close(found, want, **CLOSE)
    assert not torch.allclose(found, before, atol=1e-3)


def test_parts_are_tied_apart() -> None:
    model = own()
    mlp = [name for name, _ in find_stack(model).layer(1).named_parameters() if name.startswith("mlp.")]
    changed = copy.deepcopy(model)
    for name in mlp:
        find_stack(changed).layer(1).get_parameter(name).data.copy_(find_stack(model).layer(0).get_parameter(name))
    with running(model, "0,1a,1m=0,2-3"):
        torch.testing.assert_close(logits(model), logits(changed), **CLOSE)


def test_own_tensors_stand_in_front_of_tied_ones() -> None:
    """`2=1:x`: what x has is the run's own, all other matrices are those of layer 1."""
    model = own()
    up = torch.randn(find_stack(model).layer(2).mlp.up_proj.weight.shape)
    with tied(model, 2, 1):
        find_stack(model).layer(2).mlp.up_proj.weight.data.copy_(up)
        want = logits(model)
    with running(model, "0-1,2=1:x,3", {"x.mlp.up_proj.weight": up}):
        torch.testing.assert_close(logits(model), want, **CLOSE)
        assert not torch.equal(find_stack(model).layer(1).mlp.up_proj.weight, up)


def test_a_tie_sees_what_is_put_into_its_layer() -> None:
    """A step of an optimiser, another parameter, an adapter: looked up at every call."""
    model = own()
    handle = apply(model, "0-1,2=1,3")
    layer = find_stack(model).layers
    try:
        one = handle.bound.executor().layer(1)
        one.mlp.down_proj.weight.data.mul_(0.5)
        found = logits(model)
        one.self_attn.q_proj.weight = torch.nn.Parameter(one.self_attn.q_proj.weight.detach() * 2)
        second = logits(model)
    finally:
        handle.restore()
    assert layer is not None
    with tied(model, 2, 1):
        torch.testing.assert_close(logits(model), second, **CLOSE)
    assert not torch.allclose(found, second, atol=1e-5)
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    with tied(adapted.base_model.model, 2, 1):
        want = logits(adapted)
    with running(adapted, "0-1,2=1,3"):
        torch.testing.assert_close(logits(adapted), want, **CLOSE)


def test_gradients_of_all_runs_meet_in_the_tied_matrix() -> None:
    """That of layer 1 is the sum of both runs'; the matrix of layer 2 has none, its norms do."""
    model = own().train()
    apart = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in find_stack(apart).layer(2).named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(find_stack(apart).layer(1).get_parameter(name))
    apart(input_ids=IDS, labels=IDS).loss.backward()
    with running(model, "0-1,2=1,3"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    first, second = (find_stack(apart).layer(n) for n in (1, 2))
    for name, parameter in find_stack(model).layer(1).named_parameters():
        wanted = first.get_parameter(name).grad
        wanted = wanted + second.get_parameter(name).grad if parameter.dim() > 1 else wanted
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-6, rtol=1e-4, msg=name)
    gradients = {n: p.grad is not None for n, p in find_stack(model).layer(2).named_parameters()}
    assert gradients == {n: p.dim() == 1 for n, p in find_stack(model).layer(2).named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cost_counts_each_matrix_once(family: str) -> None:
    model = own(family)
    spec = inspect(model)
    plan = parse_plan("0,1-3=0", Plan.identity(spec))
    layers = [dict(find_stack(model).layer(n).named_parameters()) for n in range(4)]
    matrices = sum(p.numel() for p in layers[0].values() if p.dim() > 1)
    vectors = sum(p.numel() for layer in layers for p in layer.values() if p.dim() == 1)
    whole = cost(Plan.identity(spec), spec)
    found = cost(plan, spec)
    assert found.params == spec.other_params + matrices + vectors
    assert found.written_params == whole.written_params == spec.params
    assert (found.kv_per_token, found.decode_flops) == (whole.kv_per_token, whole.decode_flops)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_written_model_has_copies(family: str, bases: Any, tmp_path: Path) -> None:  # noqa: F811
    """Stock, proved, the live plan's logits; streamed from file to file the same bytes."""
    folder = bases(family)
    text = "0-1,3=1,2=0"
    one, other = tmp_path / "one", tmp_path / "other"
    written(folder, text, one)
    assert streamed(folder, text, other).proof.passed
    assert content(one) == content(other)
    model = own(family)
    made = rewrite(model, text)
    with running(model, text):
        torch.testing.assert_close(logits(made), logits(model), **CLOSE)
    storages = [p.data_ptr() for p in find_stack(made).layers.parameters()]
    assert len(set(storages)) == len(storages)


def test_what_a_tie_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    model = own()
    plan = parse_plan("0-1,2=1,3", Plan.identity(inspect(model)))
    for learner in ("lora:rank=2", "all", "top:count=1"):
        asked = learner_of(model, "cross-entropy", learn=[learner], plan="0-1,2=1")
        with pytest.raises(UsageError, match="layer 2 of the plan has the matrices of 1") as caught, asked:
            pass
        assert caught.value.code == "U679"
    get_peft_model(own(), LoraConfig(target_modules=["up_proj"])).save_pretrained(tmp_path)
    with pytest.raises(WriteError, match="layer 2 of the plan runs with the matrices of layer 1") as refused:
        refuse_adapter(tmp_path, model, blueprint(model, plan))
    assert refused.value.code == "W296"
    both = parse_plan("0-1,2=1:x,3", Plan.identity(inspect(model)))
    with pytest.raises(PlanError, match="as a module it would have all of its own") as module:
        apply(model, both, {"x.mlp.up_proj.weight": find_stack(model).layer(2).mlp.up_proj.weight}, modules=True)
    assert module.value.code == "P157"


def test_two_loops_are_a_cache_row_each() -> None:
    """A tie shares matrices, never KV: `0-1,2-3=0-1` fills four rows, cached as uncached."""
    model = own()
    cache = DynamicCache(config=model.config)
    with running(model, "0-1,2-3=0-1"), torch.no_grad():
        whole = model(input_ids=IDS).logits
        steps = [model(input_ids=IDS[:, n : n + 1], past_key_values=cache).logits for n in range(IDS.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)
    assert [layer.keys.shape[2] for layer in cache.layers] == [9] * 4
