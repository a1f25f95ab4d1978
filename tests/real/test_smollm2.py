"""The built-in model, SmolLM2-135M-Instruct: what is known about it, and what Shoal must find."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shoal
from shoal.api.measuring import measure
from shoal.api.prune import prune
from shoal.models.load import Loaded
from shoal.plan import Plan, Shape, Spec, cost, drop, parse_plan
from shoal.scores import Scores

DEPTH, HIDDEN, PARAMS, LAYER_PARAMS = 30, 576, 134_515_008, 3_540_096
KV_PER_TOKEN = 30 * 2 * 3 * 64
PROMPTS = ("The capital of France is", "def add(a, b):\n    return")
GONE = (12, 13, 14, 15, 16, 17)


@pytest.fixture(scope="module")
def model(smollm2: Loaded) -> Any:
    return smollm2.model


@pytest.fixture(scope="module")
def spec(model: Any) -> Spec:
    return shoal.inspect(model)


@pytest.fixture(scope="module")
def identity(spec: Spec) -> Plan:
    return Plan.identity(spec)


@pytest.fixture(scope="module")
def influence(smollm2: Loaded) -> Scores:
    return measure(smollm2, length=64, limit=4, batch=4)


@pytest.fixture(scope="module")
def shorter(model: Any, identity: Plan) -> Any:
    return shoal.rewrite(model, drop(identity, GONE))


def prompt_ids(smollm2: Loaded, prompt: str) -> torch.Tensor:
    return smollm2.tokenizer(prompt, return_tensors="pt")["input_ids"]


def test_the_spec_is_that_of_the_paper(spec: Spec) -> None:
    stack = spec.stack()
    assert (spec.family, stack.name, stack.path) == ("llama", "decoder", "model.layers")
    assert (stack.depth, stack.hidden, spec.params) == (DEPTH, HIDDEN, PARAMS)
    assert {layer.params for layer in stack.layers} == {LAYER_PARAMS}
    assert {layer.kind for layer in stack.layers} == {"full_attention"}
    assert sum(layer.kv.per_token for layer in stack.layers) == KV_PER_TOKEN
    assert all(layer.attention is not None and layer.mlp is not None for layer in stack.layers)


@torch.no_grad()
def test_the_identity_plan_changes_no_bit(smollm2: Loaded, model: Any, identity: Plan) -> None:
    ids = prompt_ids(smollm2, PROMPTS[0])
    expected = model(ids).logits
    with shoal.running(model, identity):
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)


def test_the_first_and_the_last_layer_matter_most(influence: Scores) -> None:
    order = influence.order()
    assert set(order[-2:]) == {0, DEPTH - 1}
    assert all(5 <= layer < DEPTH - 2 for layer in order[:6]), order
    assert all(0 < value < 2 for value in influence.values)
    assert all(error is not None and error > 0 for error in influence.errors)
    assert influence.data.startswith("builtin")


def test_shortgpt_removes_the_least_of_the_middle(smollm2: Loaded, influence: Scores) -> None:
    found = prune(smollm2, drop=6, length=64, limit=4, batch=4)
    assert found.plan.dropped() == tuple(sorted(influence.order()[:6]))
    assert found.after.written_params == 113_274_432


def test_six_layers_less_is_six_layers_less(spec: Spec, identity: Plan, shorter: Any) -> None:
    predicted = cost(drop(identity, GONE), spec, Shape())
    counted = sum(parameter.numel() for parameter in shorter.parameters())
    assert counted == predicted.params == predicted.written_params == 113_274_432 == PARAMS - 6 * LAYER_PARAMS
    assert predicted.kv_per_token == KV_PER_TOKEN * 24 // 30
    assert shorter.config.num_hidden_layers == 24
    assert type(shorter).__name__ == "LlamaForCausalLM"


@torch.no_grad()
@pytest.mark.parametrize("text", ["0a,0m,1-28a,0m,29a,0m", "0,1a,0m,2-29"])
def test_halves_are_joined_to_stock_layers(smollm2: Loaded, model: Any, spec: Spec, identity: Plan, text: str) -> None:
    """One mlp for all layers, and for two; a stock model of 30 layers holds a copy for each."""
    text = text.replace("1-28a", ",".join(f"{layer}a,0m" for layer in range(1, 28)) + ",28a")
    plan = parse_plan(text, identity)
    made = shoal.rewrite(model, plan)
    counted = sum(parameter.numel() for parameter in made.parameters())
    assert counted == PARAMS == cost(plan, spec).written_params
    assert made.config.num_hidden_layers == DEPTH
    ids = prompt_ids(smollm2, PROMPTS[0])
    with shoal.running(model, plan):
        assert torch.equal(made(ids).logits, model(ids).logits)


@torch.no_grad()
def test_the_rewritten_model_computes_what_the_plan_computes(
    smollm2: Loaded, model: Any, identity: Plan, shorter: Any
) -> None:
    ids = prompt_ids(smollm2, "Bread is made from flour, water and salt; it rises because of yeast.")
    dense = model(ids).logits
    with shoal.running(model, drop(identity, GONE)):
        live = model(ids).logits
    assert (live - shorter(ids).logits).abs().max() <= 1e-4
    assert (live - dense).abs().max() > 1


@pytest.mark.parametrize("prompt", PROMPTS)
def test_live_and_rewritten_write_the_same(
    smollm2: Loaded, model: Any, identity: Plan, shorter: Any, prompt: str
) -> None:
    inputs = smollm2.tokenizer(prompt, return_tensors="pt")
    greedy: dict[str, Any] = {
        "max_new_tokens": 16,
        "min_new_tokens": 16,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
    }
    with shoal.running(model, drop(identity, GONE)):
        live = model.generate(**inputs, **greedy)
    written = shorter.generate(**inputs, **greedy)
    assert live.shape[1] == inputs["input_ids"].shape[1] + 16
    assert torch.equal(live, written)
