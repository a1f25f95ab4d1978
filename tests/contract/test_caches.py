"""Caches that compress rows, each through the registry: what they restore, hold and refuse, on every tiny family."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import shoal
from shoal.compressing.cache import cache_to_write, make_cache
from shoal.errors import ShoalError
from shoal.evaluation.memory import tensors_of, values_held
from shoal.evaluation.prefix import perplexity_behind_prefix
from shoal.examples import CacheExamples, Refusal
from shoal.live import running
from shoal.models.load import Loaded
from shoal.registry import entries

from .families import FAMILIES, tiny
from .live_models import own
from .planted import data_of, random_data
from .policy_cells import LENGTH, batch_of
from .shares import pairs

EXAMPLES: dict[str, CacheExamples] = {name: entry.examples for name, entry in entries("caches").items()}
TEXTS = [text for found in EXAMPLES.values() for text in found.texts]
NULL = [text for found in EXAMPLES.values() for text in found.null]
REFUSED = [pytest.param(no, id=f"{name}-{no.title}") for name, found in EXAMPLES.items() for no in found.refused]
GROUPED = "minicache:start=0"
PLANS = ("0-3", "0,2,3", "0-2,2,3", "0,1@0,2,3", "0-1,3,2", "0a,1m,2,3", "(0|1),2,3")
WHERE = tuple(family for family in FAMILIES if family != "mamba2")


@torch.no_grad()
def steps(model: PreTrainedModel, batch: dict[str, torch.Tensor], cache: Any) -> torch.Tensor:
    """Logits of a prefill of seven tokens, of two, and of single ones."""
    out, start = [], 0
    for end in (7, 9, *range(10, LENGTH + 1)):
        ids, mask = batch["input_ids"][:, start:end], batch["attention_mask"][:, :end]
        out.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
        start = end
    return torch.cat(out, 1)


def made(model: PreTrainedModel, text: str, batch: dict[str, torch.Tensor]) -> Any:
    return make_cache(model, text, batch["attention_mask"][:, :7], batch["input_ids"][:, :7])


def unless_ragged(make: Callable[[], Any]) -> Any:
    """What `make` makes; None where the sequences of a batch would hold different numbers of tokens."""
    try:
        return make()
    except ShoalError as error:
        if "one at a time" not in str(error):
            raise
        return None


def unless_refused(model: PreTrainedModel, text: str, batch: dict[str, torch.Tensor]) -> Any:
    """The cache; None for a model of windows or recurrent states."""
    try:
        return made(model, text, batch)
    except ShoalError as error:
        if error.code != "P161":
            raise
        assert {layer.kv.kind for layer in shoal.inspect(model).stack().layers} != {"full"}
        return None


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("family", "text"), pairs(3, WHERE, NULL))
def test_a_null_setting_is_the_plain_cache_bit_for_bit(family: str, text: str, rows: int) -> None:
    model, batch = tiny(family, "eager"), batch_of(rows)
    if (cache := unless_refused(model, text, batch)) is None:
        return
    plain = DynamicCache(config=model.config)
    assert torch.equal(steps(model, batch, cache), steps(model, batch, plain))
    assert values_held(cache) >= values_held(plain)
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize(("family", "text"), pairs(3, ("llama", "gpt2", "phi3", "bloom", "deepseek_v3"), TEXTS))
def test_a_compressed_cache_is_right_beside_padding(family: str, text: str) -> None:
    model, batch = tiny(family, "eager"), batch_of(2)
    alone = {name: one[1:, 3:] for name, one in batch.items()}
    cache, out, start = make_cache(model, text, ids=alone["input_ids"][:, :4]), [], 0
    if (together := unless_ragged(lambda: steps(model, batch, made(model, text, batch)))) is None:
        return
    with torch.no_grad():
        for end in (4, 6, *range(7, LENGTH - 2)):
            out.append(model(input_ids=alone["input_ids"][:, start:end], past_key_values=cache, use_cache=True).logits)
            start = end
    if family == "gpt2":  # counts positions from the first column, padding or not
        assert torch.isfinite(together).all()
        return
    torch.testing.assert_close(together[1:, 3:], torch.cat(out, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", TEXTS)
@torch.no_grad()
def test_less_is_held_than_in_a_plain_cache(text: str) -> None:
    model, ids = tiny("llama"), torch.arange(3, 27).repeat(2, 1)
    cache, plain = make_cache(model, text, ids=ids), DynamicCache(config=model.config)
    exact = model(ids, past_key_values=plain, use_cache=True).logits
    assert torch.equal(model(ids, past_key_values=cache, use_cache=True).logits, exact), "the prompt sees itself"
    assert values_held(cache) < values_held(plain)
    stored = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors_of(cache)}
    assert sum(stored.values()) < 4 * values_held(plain), "the storages shrank, not the views alone"
    assert sum(row.whole if hasattr(row, "whole") else row.keys.numel() * 2 for row in cache.layers) == values_held(
        plain
    )
    after = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
    assert torch.isfinite(after).all() and cache.get_seq_length() == 25
    assert not torch.equal(after, model(ids[:, :1], past_key_values=plain, use_cache=True).logits)


@pytest.mark.parametrize(
    ("plan", "text"),
    pairs(1, PLANS, ["anchors:every=3,first=1", "anchors:every=1", GROUPED, "minicache:start=0,keep=1"]),
)
def test_a_cache_goes_with_every_plan(plan: str, text: str) -> None:
    model, batch = tiny("llama"), batch_of(2)
    with running(model, plan):
        plain = DynamicCache(config=model.config)
        expected = steps(model, batch, plain)
        if (cache := unless_ragged(lambda: made(model, text, batch))) is None:
            batch = batch_of(1)
            expected, cache = steps(model, batch, plain := DynamicCache(config=model.config)), made(model, text, batch)
        found = steps(model, batch, cache)
        assert len(cache.layers) == len(plain.layers)
        assert torch.equal(found[:, :7], expected[:, :7])
        if text in NULL:
            assert torch.equal(found, expected)
        else:
            assert values_held(cache) < values_held(plain)


@pytest.mark.parametrize("no", REFUSED)
def test_what_cannot_be_is_refused_before_anything_runs(no: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(no.family)
    shoal.inspect(model)
    monkeypatch.setattr(type(model), "forward", None)
    with running(model, no.plan) if no.plan != "0-3" else nullcontext(), pytest.raises(ShoalError) as caught:
        make_cache(model, no.text)
    assert caught.value.code == no.code
    assert no.words in str(caught.value)


@pytest.mark.parametrize(("family", "words"), [("mamba2", "keeps no keys"), ("jamba", "recurrent state")])
@pytest.mark.parametrize("text", TEXTS[:1])
def test_a_model_without_such_rows_is_refused(family: str, words: str, text: str) -> None:
    with pytest.raises(ShoalError, match=words) as caught:
        make_cache(tiny(family, "eager"), text)
    assert caught.value.code == "P161"


def test_who_writes_to_the_cache_himself_is_refused() -> None:
    model = tiny("llama")
    with running(model, "0-3", policy="skip:listed=1"), pytest.raises(ShoalError) as caught:
        make_cache(model, TEXTS[0])
    assert caught.value.code == "P161"
    with pytest.raises(ShoalError) as caught:
        make_cache(model, "minicash")
    assert caught.value.code == "U501" and "minicache" in str(caught.value)


@pytest.mark.parametrize("text", [*TEXTS, *NULL])
@torch.no_grad()
def test_generate_takes_the_cache(text: str) -> None:
    model, batch = tiny("llama"), batch_of(1 if text.startswith("anchors") else 2)
    asked: dict[str, Any] = {**batch, "max_new_tokens": 4, "do_sample": False}
    plain = model.generate(**asked)
    cache = make_cache(model, text, batch["attention_mask"], batch["input_ids"])
    found = model.generate(**asked, past_key_values=cache)
    assert found.shape == plain.shape and cache.get_seq_length() == found.shape[1] - 1
    if text in NULL:
        assert torch.equal(found, plain)
        beams = {**asked, "num_beams": 3, "num_return_sequences": 2}
        mask = batch["attention_mask"].repeat_interleave(3, 0)
        assert torch.equal(
            model.generate(**beams), model.generate(**beams, past_key_values=make_cache(model, text, mask))
        )
    with pytest.raises(ShoalError, match="P161"):
        cache.crop(-1)


def test_two_kinds_of_cache_are_refused() -> None:
    model = own("llama")
    ids = batch_of(1)["input_ids"]
    assert cache_to_write(model, GROUPED, ids).get_seq_length() == 0
    model.generation_config.cache_implementation = "quantized"
    with pytest.raises(ShoalError, match="U661"):
        cache_to_write(model, GROUPED, ids)


def test_a_mask_of_another_prompt_is_refused() -> None:
    model, batch = tiny("llama"), batch_of(2)
    with pytest.raises(ShoalError, match=r"shape \(2, 12\).*\(2, 7\)"):
        steps(model, batch, make_cache(model, GROUPED, batch["attention_mask"]))


@pytest.mark.parametrize("padded", [False, True])
def test_the_second_half_is_scored_behind_the_first(padded: bool) -> None:
    """With a plain cache, or one that changes nothing, these are the losses of one pass."""
    model, data = tiny("llama"), random_data(4, 16)
    if padded:
        mask = torch.ones_like(data.ids)
        mask[0, :3], mask[1, 12:] = 0, 0
        data = data_of(data.ids, mask)
    whole = data_of(data.ids, data.mask)
    expected = _second_halves(model, whole)
    plain, held = perplexity_behind_prefix(model, data, batch=2)
    assert held.values == held.whole > 0 and held.prefix == 8
    torch.testing.assert_close(torch.tensor(plain.per_sequence).double(), expected, atol=1e-5, rtol=1e-5)
    null, _ = perplexity_behind_prefix(model, data, lambda mask, ids: make_cache(model, NULL[0], mask, ids), batch=2)
    assert null.per_sequence == plain.per_sequence
    mine, less = perplexity_behind_prefix(model, data, lambda mask, ids: make_cache(model, GROUPED, mask, ids), batch=2)
    assert less.values < less.whole == held.whole and mine.value != plain.value
    with pytest.raises(ShoalError, match="U514"):
        perplexity_behind_prefix(model, random_data(1, 3))


def _second_halves(model: PreTrainedModel, data: Any) -> torch.Tensor:
    """Mean loss of the second half's tokens, its first left out, by one pass over each window."""
    from shoal.evaluation.scoring import batch_tokens, windows

    found = []
    with torch.no_grad():
        for ids, mask, keep in windows(data, 2, None, ""):
            keep[:, : ids.shape[1] // 2] = False
            found.append(batch_tokens(model, ids, mask, keep).sum(-1) / keep.sum(-1).clamp(min=1))
    return torch.cat(found)


def loaded(tokenizer: Any = None) -> Loaded:
    return Loaded(tiny("llama"), tokenizer, "tiny")


def test_evaluate_behind_a_compressed_prefix() -> None:
    data = random_data(3, 16)
    found = shoal.evaluate(loaded(), data=data, plan="0-3", kv_cache=TEXTS[0])
    assert found.dense is not None and found.kv is not None and found.generation is None
    assert found.perplexity.value != found.dense.value and found.perplexity.tokens == 3 * 7
    assert found.to_dict()["kv"] == {"values": found.kv.values, "whole": found.kv.whole, "prefix": 8}
    for more in ({"against": loaded()}, {"tasks": ["x.jsonl"]}):
        with pytest.raises(ShoalError, match="U660"):
            shoal.evaluate(loaded(), data=data, kv_cache=TEXTS[0], **more)


def test_generate_refuses_what_decides_by_itself() -> None:
    for more in ({"policy": "exit:after=1"}, {"fast": True}):
        with pytest.raises(ShoalError, match="U660"):
            shoal.generate(loaded(), "abc", kv_cache=TEXTS[0], **more)
