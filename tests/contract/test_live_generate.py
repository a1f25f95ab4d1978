"""What users read from a model under a live plan: generated text, caches, hidden states, attentions."""

from __future__ import annotations

import inspect as python_inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from shoal.live import running
from shoal.models.stacks import find_stack
from shoal.writing.surgery import rewrite

from .families import tiny
from .live_models import IDS, PADDED, code_of, logits, own, plan_of

KV_SOURCE = {
    "llama": "0-2,3@1",
    "gpt2": "0-2,3@1",
    "qwen2": "0-1,2@0,3",
    "gemma3_text": "0-1,2@0,3",
    "jamba": "0-2,3@1",
}
PLANS = ("0-1,3", "1-3", "0,1x2,2-3", "0m,1-3", "KV source")


@torch.no_grad()
def greedy_without_cache(model: PreTrainedModel, tokens: int) -> torch.Tensor:
    """[b, t + tokens] by whole forwards, positions counted from the first real token as `generate` does."""
    ids, mask = PADDED["input_ids"], PADDED["attention_mask"]
    positioned = "position_ids" in python_inspect.signature(model.forward).parameters
    for _ in range(tokens):
        places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positioned else {}
        best = model(input_ids=ids, attention_mask=mask, use_cache=False, **places).logits[:, -1].argmax(-1)
        ids, mask = torch.cat([ids, best[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", KV_SOURCE)
def test_generate_equals_a_greedy_loop_without_cache(family: str, plan: str) -> None:
    model = tiny(family)
    with running(model, KV_SOURCE[family] if plan == "KV source" else plan):
        expected = greedy_without_cache(model, 8)
        for kind in ("dynamic", "static"):
            found = model.generate(**PADDED, max_new_tokens=8, do_sample=False, cache_implementation=kind)
            assert torch.equal(found, expected), kind


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("plan", ["0-1,3", "0,1x2,2-3"])
def test_beams_and_prompt_lookup_equal_the_rewritten_stock_model(family: str, plan: str) -> None:
    model = tiny(family)
    stock = rewrite(model, plan_of(model, plan))
    repetitive = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    beams: dict[str, Any] = {**PADDED, "num_beams": 2}
    lookup: dict[str, Any] = {"input_ids": repetitive, "attention_mask": torch.ones_like(repetitive)}
    lookup["prompt_lookup_num_tokens"] = 3
    for settings in (beams, lookup):
        expected = stock.generate(**settings, max_new_tokens=10, do_sample=False)
        with running(model, plan):
            assert torch.equal(model.generate(**settings, max_new_tokens=10, do_sample=False), expected)


def test_an_own_cache_grows_right_with_and_without_a_config() -> None:
    model = own("llama").double()  # pieces of another shape take other kernels, whose rounding shows in float32
    with running(model, "0,1x2,3"):
        whole = logits(model)
        for cache in (DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=12)):
            pieces = [IDS[:, :5], IDS[:, 5:6], IDS[:, 6:]]
            parts = [logits(model, input_ids=piece, past_key_values=cache, use_cache=True) for piece in pieces]
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=1e-6)
            assert [int(row.get_seq_length()) for row in cache.layers] == [9] * 4


def test_a_cache_that_is_not_empty_is_refused() -> None:
    model = tiny("llama")
    cache = DynamicCache(config=model.config)
    logits(model, past_key_values=cache, use_cache=True)
    assert code_of(model, "0-1,3", past_key_values=cache, use_cache=True) == "P123"
    cache = DynamicCache(config=model.config)
    with running(model, "0-1,3"):
        logits(model, past_key_values=cache, use_cache=True)
    assert code_of(model, "0,1x2,3", past_key_values=cache, use_cache=True) == "P123"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "jamba"])
@pytest.mark.parametrize("plan", ["0-1,3", "0,1x2,2-3"])
def test_hidden_states_have_one_entry_for_each_run(family: str, plan: str) -> None:
    model = tiny(family, "eager")
    inputs: list[torch.Tensor] = []
    layers = list(find_stack(model).layers)
    with torch.no_grad(), running(model, plan) as handle:
        handles = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
        out = model(IDS, output_hidden_states=True)
    for hook in handles:
        hook.remove()
    assert len(out.hidden_states) == len(handle.plan.layers()) + 1
    assert all(torch.equal(got, put) for got, put in zip(out.hidden_states[:-1], inputs, strict=True))
    assert torch.equal(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)


@pytest.mark.parametrize("family", ["bloom", "falcon", "gptj", "gpt_neo"])
def test_families_that_collect_in_their_loop_report_one_state_for_each_base_layer(family: str) -> None:
    """Their own loop appends the state at every layer: what a plan left out shows its input again, and of a repeat only
    what goes in shows. The last entry is right, and so is what a layer that runs in its own place is given."""
    model = tiny(family, "eager")
    with torch.no_grad():
        with running(model, "0-1,3"):
            dropped = model(IDS, output_hidden_states=True).hidden_states
        with running(model, "0,1x2,2-3"):
            out = model(IDS, output_hidden_states=True)
    repeated = out.hidden_states
    torch.testing.assert_close(model.get_output_embeddings()(repeated[-1]), out.logits, atol=1e-5, rtol=1e-5)
    assert len(dropped) == len(repeated) == 5
    assert torch.equal(dropped[2], dropped[3])
    assert torch.equal(repeated[1], dropped[1]) and not torch.equal(repeated[2], dropped[2])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("plan", ["0-1,3", "0,1x2,2-3"])
def test_attentions_equal_those_of_the_rewritten_model(family: str, plan: str) -> None:
    model = tiny(family, "eager")
    stock = rewrite(model, plan_of(model, plan))
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        expected = stock(IDS, output_attentions=True).attentions
        with running(model, plan):
            found = model(IDS, output_attentions=True).attentions
    assert len(found) == len(expected) > 2
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
