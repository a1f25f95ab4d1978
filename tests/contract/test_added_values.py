"""Values of an earlier layer beside a run's own (`13@v0+:ID`), as value residual learning has them (ResFormer)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from shoal.errors import PlanError
from shoal.live import running
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import check, cost

from .families import VOCAB, tiny
from .healing import batch_of, gradients, learner_of
from .matrix import kv_pair
from .references import CLOSE
from .shares import every

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
PADDED = {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(IDS)}
PADDED["input_ids"][1, :3], PADDED["attention_mask"][1, :3] = 0, 0
PADDED["position_ids"] = (PADDED["attention_mask"].cumsum(-1) - 1).clamp(min=0)
FAMILIES = [
    "llama", "gpt2", "opt", "qwen2", "qwen3", "gemma3_text", "mixtral", "phi3", "olmo2", "granite", "stablelm",
    "falcon",
]  # fmt: skip


def logits(model: Any, **batch: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**({"input_ids": IDS, "use_cache": False} | batch)).logits
    return found


def plan_for(model: PreTrainedModel, end: str = "") -> str:
    source, taker = kv_pair(open_model(model).spec)
    return ",".join(f"{n}@v{source}+{end}" if n == taker else str(n) for n in range(4))


@pytest.mark.parametrize("family", every(3, FAMILIES))
def test_shares_of_nothing_and_of_all_are_what_they_should_be(family: str) -> None:
    """(0, 1) is the layer itself, (1, 0) is what the plan with these values alone computes."""
    model = tiny(family, "eager")
    plan = plan_for(model, ":mix")
    with running(model, plan, {"mix.values": torch.tensor([0.0, 1.0])}):
        torch.testing.assert_close(logits(model), logits_of(model, "0-3"), **CLOSE)
    with running(model, plan, {"mix.values": torch.tensor([1.0, 0.0])}):
        found = logits(model)
    torch.testing.assert_close(found, logits_of(model, plan_for(model).replace("+", "")), **CLOSE)
    with running(model, plan_for(model)):
        halves = logits(model)
    with running(model, plan, {"mix.values": torch.tensor([0.5, 0.5])}):
        assert torch.equal(logits(model), halves)
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
            if family == "falcon" and isinstance(cache, StaticCache):
                continue
            pieces = [
                logits(model, input_ids=IDS[:, a:b], past_key_values=cache, use_cache=True)
                for a, b in ((0, 4), (4, 6), (6, 7), (7, 8), (8, 9))
            ]
            torch.testing.assert_close(torch.cat(pieces, 1), halves, **CLOSE)
        alone = logits(model, input_ids=IDS[1:, 3:])
        torch.testing.assert_close(logits(model, **PADDED)[1, 3:], alone[0], **CLOSE)


def logits_of(model: PreTrainedModel, plan: str) -> torch.Tensor:
    whole = copy.deepcopy(model)
    if plan == "0-3":
        return logits(whole)
    with running(whole, plan):
        return logits(whole)


def test_it_is_the_weighted_sum_by_hand() -> None:
    model = tiny("llama", "eager")
    made = copy.deepcopy(model)
    layers: Any = find_stack(made).layers
    seen: list[torch.Tensor] = []
    layers[0].self_attn.v_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    for layer in (1, 3):
        layers[layer].self_attn.v_proj.register_forward_hook(lambda _, __, out: 0.25 * seen[-1] + 0.75 * out)
    want = logits(made)
    with running(model, "0,1@v0+:mix,2,3@v0+:mix", {"mix.values": torch.tensor([0.25, 0.75])}):
        torch.testing.assert_close(logits(model), want, **CLOSE)


def test_a_layer_that_is_added_may_have_values_added_itself() -> None:
    """Chains: what is added is what was stored."""
    model = tiny("llama", "eager")
    made = copy.deepcopy(model)
    layers: Any = find_stack(made).layers
    seen: list[torch.Tensor] = []
    layers[0].self_attn.v_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    for layer in (1, 2):

        def hook(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
            seen.append((seen[-1] + out) / 2)
            return seen[-1]

        layers[layer].self_attn.v_proj.register_forward_hook(hook)
    want = logits(made)
    with running(model, "0,1@v0+,2@v1+,3"):
        torch.testing.assert_close(logits(model), want, **CLOSE)


@pytest.mark.parametrize("plan", ["0,1@v0+:mix,2-3", "0,1@v0+,2@v1+:mix,3@2"])
def test_shares_learn_under_checkpointing_too(plan: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = copy.deepcopy(tiny("llama", "sdpa")).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        shares = torch.tensor([0.3, 0.7], requires_grad=True)
        with running(model, plan, {"mix.values": shares}):
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append({"shares": shares.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and bool(found[0]["shares"].all())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **CLOSE)


def test_the_learner_of_a_plans_tensors_moves_the_shares() -> None:
    weights = {"mix.values": torch.tensor([0.5, 0.5])}
    model = tiny("llama", "sdpa")
    with learner_of(model, "cross-entropy", learn=["plan"], plan="0,1@v0+:mix,2-3", weights=weights) as learner:
        assert bool(gradients(learner, batch_of(2), 2)["mix.values"].all())


def test_what_it_costs_and_what_is_refused() -> None:
    model = tiny("llama", "eager")
    spec = open_model(model).spec
    plain, added = cost("0-3", spec), cost("0-2,3@v0+", spec)
    assert cost("0-2,3@v0+:mix", spec, weights={"mix.values": (2,)}).params == plain.params + 2
    assert (added.params, added.kv_per_token) == (plain.params, plain.kv_per_token)
    assert [p.code for p in check("0-2,3@v3+", spec)] == ["P107"]
    for plan, name in (("0-2,3@v0+:x", "x.values"), ("0-2,3:x", "x.values")):
        with pytest.raises(PlanError) as caught:
            running(model, plan, {name: torch.zeros(3)}).__enter__()
        assert caught.value.code == "P129"


@pytest.mark.parametrize(
    ("plan", "without"),
    [
        ("0-1,2@v0+@a1:mix,3", "0-1,2@a1,3"),
        ("0-1,2@k1@v0+:mix,3", "0-1,2@k1,3"),
        ("0-1,2@a1,3@v2+:mix", "0-1,2@a1,3"),
    ],
)
def test_it_goes_with_keys_and_maps_of_others(plan: str, without: str) -> None:
    """A run that stores values alone may add others to them, and have its own added elsewhere."""
    model = tiny("llama", "eager")
    with running(model, without):
        plain = logits(model)
    with running(model, plan, {"mix.values": torch.tensor([0.0, 1.0])}):
        torch.testing.assert_close(logits(model), plain, **CLOSE)
    with running(model, plan, {"mix.values": torch.tensor([0.4, 0.6])}):
        want = logits(model)
        cache = DynamicCache(config=model.config)
        pieces = [
            logits(model, input_ids=IDS[:, a:b], past_key_values=cache, use_cache=True) for a, b in ((0, 4), (4, 9))
        ]
        torch.testing.assert_close(torch.cat(pieces, 1), want, **CLOSE)
        assert not torch.allclose(want, plain, atol=1e-4)
    whole = copy.deepcopy(model)
    layers: Any = find_stack(whole).layers
    source, taker = (2, 3) if plan.endswith("mix") and "3@v2" in plan else (0, 2)
    seen: list[torch.Tensor] = []
    layers[source].self_attn.v_proj.register_forward_hook(lambda _, __, out: seen.append(out))
    layers[taker].self_attn.v_proj.register_forward_hook(lambda _, __, out: 0.4 * seen[-1] + 0.6 * out)
    with running(whole, without):
        torch.testing.assert_close(logits(whole), want, **CLOSE)
