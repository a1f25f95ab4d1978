"""A run that takes over the attention map of an earlier layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from shoal.errors import PlanError
from shoal.live import apply, running
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack
from shoal.plan import Plan, cost, parse_plan

from .families import VOCAB, tiny
from .references import CLOSE, with_map_of

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
PADDED = {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(IDS)}
PADDED["input_ids"][1, :3], PADDED["attention_mask"][1, :3] = 0, 0
PADDED["position_ids"] = (PADDED["attention_mask"].cumsum(-1) - 1).clamp(min=0)
PLANS = {
    "llama": "0-1,2-3@a1",
    "gpt2": "0-1,2@a1,3@a1",
    "qwen2": "0-1,2@a0,3@a1",
    "mixtral": "0-2,3@a1",
    "gemma2": "0-1,2@a0,3",
}
CELLS = [*((family, "eager") for family in PLANS), *((family, "sdpa") for family in PLANS if family != "gemma2")]


def own(family: str, attention: str) -> PreTrainedModel:
    return copy.deepcopy(tiny(family, attention))


@torch.no_grad()
def logits(model: PreTrainedModel, **batch: Any) -> torch.Tensor:
    return model(**({"input_ids": IDS, "use_cache": False} | batch)).logits


@pytest.mark.parametrize(("family", "attention"), CELLS)
def test_cached_padded_and_static_passes_are_one_pass(family: str, attention: str) -> None:
    model = own(family, attention)
    before = logits(model)
    with running(model, PLANS[family]):
        want = logits(model)
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=12)):
            pieces = [
                logits(model, input_ids=IDS[:, a:b], past_key_values=cache, use_cache=True)
                for a, b in ((0, 4), (4, 6), (6, 7), (7, 8), (8, 9))
            ]
            torch.testing.assert_close(torch.cat(pieces, 1), want, **CLOSE)
        alone = logits(model, input_ids=IDS[1:, 3:])
        torch.testing.assert_close(logits(model, **PADDED)[1, 3:], alone[0], **CLOSE)
    assert not torch.allclose(want, before, atol=1e-4)
    assert torch.equal(logits(model), before), "the layers have their own attention back"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mixtral"])
def test_both_attentions_make_one_map(family: str) -> None:
    found = []
    for attention in ("sdpa", "eager"):
        model = own(family, attention)
        with running(model, PLANS[family]):
            found.append(logits(model, **PADDED)[PADDED["attention_mask"].bool()])
    torch.testing.assert_close(found[0], found[1], **CLOSE)


def test_it_is_what_the_layer_makes_of_that_map_by_hand() -> None:
    model = own("llama", "eager")
    want = with_map_of(model, {"input_ids": IDS}, 0, 3)
    with running(model, "0-2,3@a0"):
        torch.testing.assert_close(logits(model), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["bloom", "falcon", "gptj"])
def test_families_that_hand_out_no_map_are_refused(family: str) -> None:
    model = own(family, "eager")
    with pytest.raises(PlanError, match="no way is known to an attention map") as caught:
        apply(model, "0-2,3@a2")
    assert caught.value.code == "P141"
    assert logits(model).isfinite().all()


def test_other_attentions_are_refused() -> None:
    model = own("llama", "sdpa")
    with running(model, "0-2,3@a2"):
        find_stack(model).layer(2).self_attn.config = changed = copy.copy(model.config)
        changed._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(PlanError, match="flash_attention_2 hands out no attention map") as caught:
            logits(model)
    assert caught.value.code == "P141"


def test_a_follower_saves_queries_and_keys_with_their_scores() -> None:
    spec = inspect(tiny("llama"))
    plan, plain = parse_plan("0-2,3@a2", Plan.identity(spec)), Plan.identity(spec)
    saved = cost(plain, spec).decode_flops - cost(plan, spec).decode_flops
    layer = spec.stack().layers[3]
    heads, hidden = layer.width // (layer.kv.key_dim + layer.kv.value_dim), spec.stack().hidden
    matrices = hidden * layer.kv.key_dim * (heads + layer.kv.heads)
    assert saved == 2 * heads * layer.kv.key_dim * 512 + 2 * matrices
    assert cost(plain, spec).params - cost(plan, spec).params == matrices
    assert cost(plain, spec).kv_per_token - cost(plan, spec).kv_per_token == layer.kv.heads * layer.kv.key_dim


@pytest.mark.parametrize("family", PLANS)
def test_gradients_go_through_a_map_under_gradient_checkpointing(family: str) -> None:
    """The source is run again in the backward pass, and its followers, with the map that they share."""
    model = own(family, "eager").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = []
    with running(model, PLANS[family]):
        for checkpointed in (False, True):
            if checkpointed:
                model.activation_checkpointing_enable()
            model.zero_grad()
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0] and found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)
