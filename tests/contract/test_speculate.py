"""Self-speculation writes what plain decoding writes, whatever drafts, and runs no more than it says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from shoal.errors import ShoalError
from shoal.live import running
from shoal.models.stacks import find_stack
from shoal.registry import entries
from shoal.speculating.forecast import DraftSetting, Forecast, SampleText, predict_speed
from shoal.speculating.lengths import Length
from shoal.speculating.speculator import Speculator

from .drafting import DRAFTS, FAMILIES, NO_TREES, prompt, weak
from .families import tiny
from .shares import pairs

GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}


def test_every_kind_of_draft_is_tested() -> None:
    assert {name: text.partition(":")[0] for name, text in DRAFTS.items()} == {name: name for name in entries("drafts")}


@pytest.mark.parametrize(
    ("family", "draft"),
    pairs(3, FAMILIES, [text for entry in entries("drafts").values() for text in entry.examples.texts]),
)
def test_greedy_text_is_that_of_plain_decoding(family: str, draft: str) -> None:
    model, ids = weak(family), prompt()
    if "tree" in draft and family in NO_TREES:
        with pytest.raises(ShoalError, match="U705"):
            Speculator(model, draft)
        return
    speculator = Speculator(model, draft, length=3)
    assert torch.equal(speculator.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    assert speculator.stats.tokens == 24
    assert speculator.stats.accepted <= speculator.stats.drafted


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_are_accepted_and_save_verifications(family: str) -> None:
    """A test of identity alone would pass with drafts that are never accepted."""
    best = 0.0
    for draft in ("exit:2", "exit:3", "skip:0-2"):
        speculator = Speculator(weak(family), draft, confidence=None)
        speculator.generate(prompt(), **GREEDY)
        stats = speculator.stats
        assert stats.accepted + stats.rounds == stats.tokens - 1
        best = max(best, stats.acceptance or 0)
    assert best > 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text", "mixtral"])
def test_a_draft_by_the_whole_model_costs_what_plain_decoding_costs(family: str) -> None:
    model, ids = weak(family), prompt()
    seen: Counter[int] = Counter()
    stack = find_stack(model)
    handles = [
        stack.layer(i).register_forward_hook(
            lambda _, __, out, i=i: seen.update({i: (out[0] if isinstance(out, tuple) else out).shape[-2]})
        )
        for i in range(stack.depth)
    ]
    model.generate(ids, **GREEDY)
    for handle in handles:
        handle.remove()
    speculator = Speculator(model, "exit:4", length=4, confidence=None)
    speculator.generate(ids, **GREEDY)
    stats = speculator.stats
    assert stats.acceptance == 1
    assert stats.layers_per_token == stack.depth
    assert {i: sum(tokens[i] for tokens in stats.layers.values()) for i in range(4)} == dict(seen)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_shared_layers_see_a_drafted_token_once(family: str) -> None:
    counted = {}
    for share in (True, False):
        speculator = Speculator(weak(family), "exit:2", length=3, confidence=None, share=share)
        speculator.generate(prompt(), **GREEDY)
        stats = counted[share] = speculator.stats
        assert stats.layers["draft"] == [stats.drafted, stats.drafted, 0, 0]
        assert stats.layers["verify"][3] == stats.drafted + stats.rounds
    assert counted[True].layers["verify"][:2] == [counted[True].rounds] * 2
    assert counted[False].layers["verify"][:2] == [counted[False].rounds + counted[False].drafted] * 2


def test_parts_are_counted_apart() -> None:
    speculator = Speculator(weak("llama"), "skip:0,1a,2m,3", length=2, confidence=None)
    speculator.generate(prompt(), **GREEDY)
    stats = speculator.stats
    assert [bool(n) for n in stats.attentions["draft"]] == [True, True, False, True]
    assert [bool(n) for n in stats.mlps["draft"]] == [True, False, True, True]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 20, "eos_token_id": [5, 9, 20, 33]},
        {"eos_token_id": list(range(3, 64, 5))},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"prefix_allowed_tokens_fn": lambda _, ids: list(range(3, 40)) if len(ids) % 2 else list(range(30, 64))},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("draft", ["exit:3", "skip:1-3", "lookup:1+exit:2"])
def test_what_generate_is_told_holds_for_the_draft(draft: str, settings: dict[str, Any]) -> None:
    model, ids, asked = weak("llama"), prompt(), GREEDY | settings
    assert torch.equal(Speculator(model, draft).generate(ids, **asked), model.generate(ids, **asked))


class _Sum(StoppingCriteria):
    """True in the middle of what a round accepts."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return (input_ids[:, 10:].sum(-1) > 150) | (input_ids.shape[1] >= 34)


class _Log(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


def test_stopping_criteria_and_streamer_hear_every_token() -> None:
    model, ids = weak("llama"), prompt()
    for draft in ("exit:4", "exit:3"):
        logs = [_Log(), _Log()]
        plain = model.generate(ids, **GREEDY, stopping_criteria=[_Sum()], streamer=logs[0])
        ours = Speculator(model, draft, confidence=None).generate(
            ids, **GREEDY, stopping_criteria=[_Sum()], streamer=logs[1]
        )
        assert torch.equal(plain, ours)
        assert plain.shape[1] < 34, "the criterion must stop before the length does"
        assert logs[0].seen == logs[1].seen


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_scores_and_cache_come_back(family: str) -> None:
    model, ids = weak(family), prompt()
    asked = GREEDY | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, ours = model.generate(ids, **asked), Speculator(model, "exit:3").generate(ids, **asked)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(ours[name]), torch.cat(plain[name]), atol=1e-4, rtol=1e-4)
    for mine, stock in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert mine.get_seq_length() == stock.get_seq_length() == 33
        torch.testing.assert_close(mine.keys[:, :, -4:], stock.keys[:, :, -4:], atol=1e-4, rtol=1e-4)
        assert not getattr(mine, "record_past", False)


def test_left_padding_is_kept() -> None:
    model, ids = weak("opt"), prompt()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(13) >= 3).long()[None]
    for draft in ("exit:2", "skip:1-3", "clasp:skip=1;every=2"):
        ours = Speculator(model, draft).generate(padded, attention_mask=mask, **GREEDY)
        assert torch.equal(ours, model.generate(padded, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize(
    ("draft", "code"),
    [
        ("exit:0", "U610"),
        ("exit:9", "U610"),
        ("skip", "U610"),
        ("skip:0-2,1", "P150"),
        ("skip:0,~1-2,3", "P150"),
        ("skip:0-9", "P103"),
        ("attention:7", "U610"),
        ("lookup:0", "U610"),
        ("clasp:skip=4", "U610"),
        ("knapsack:every=0", "U610"),
        ("swift:fraction=1.5", "U614"),
        ("cosine:2", "U614"),
        ("exit:1+skip:0", "U617"),
        ("lookup+lookup", "U617"),
        ("exti:1", "U501"),
        ("exit:layers=1", "U502"),
        ("exit:one", "U502"),
    ],
)
def test_a_draft_that_cannot_be_is_refused_by_name(draft: str, code: str) -> None:
    with pytest.raises(ShoalError) as refused:
        Speculator(weak("llama"), draft)
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"num_beams": 2}, "U615"),
        ({"prompt_lookup_num_tokens": 3}, "U615"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "U615"),
        ({"guidance_scale": 2.0}, "U615"),
        ({"num_return_sequences": 2, "do_sample": True}, "U616"),
        ({"cache_implementation": "static"}, "U612"),
        ({"use_cache": False}, "U612"),
    ],
    ids=str,
)
def test_a_way_of_decoding_that_cannot_be_is_refused_by_name(settings: dict[str, Any], code: str) -> None:
    model = weak("llama")
    before = find_stack(model).layers
    with pytest.raises(ShoalError) as refused:
        Speculator(model, "exit:2").generate(prompt(), **GREEDY | settings)
    assert refused.value.code == code
    assert find_stack(model).layers is before


def test_models_that_cannot_be_drafted_for_are_refused_by_name() -> None:
    for family, code in (("mamba2", "U611"), ("jamba", "U611")):
        with pytest.raises(ShoalError) as refused:
            Speculator(tiny(family, "eager"), "exit:2")
        assert refused.value.code == code
    with pytest.raises(ShoalError, match="U618"):
        Speculator(tiny("gemma3n_text", "eager"), "clasp:skip=1").generate(prompt(), **GREEDY)
    with running(weak("llama"), "0-2"), pytest.raises(ShoalError, match="P122"):
        Speculator(weak("llama"), "exit:2")
    for settings, code in (({"length": 0}, "U610"), ({"confidence": 1.5}, "U614"), ({"confidence": "high"}, "U614")):
        with pytest.raises(ShoalError, match=code):
            Speculator(weak("llama"), "exit:2", **settings)


def test_native_kv_sharing_drafts_without_sharing_layers() -> None:
    model = tiny("gemma3n_text", "eager")
    speculator = Speculator(model, "exit:2")
    assert torch.equal(speculator.generate(prompt(), **GREEDY), model.generate(prompt(), **GREEDY))
    assert speculator.stats.shared == 0
    swift = Speculator(model, "swift:window=4")
    assert torch.equal(swift.generate(prompt(), **GREEDY), model.generate(prompt(), **GREEDY))


class _Broken(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        raise RuntimeError("planted")


def test_the_model_comes_back_after_an_error_in_the_middle() -> None:
    model, ids = weak("llama"), prompt()
    before, layers = model(ids).logits, find_stack(model).layers
    with pytest.raises(RuntimeError, match="planted"):
        Speculator(model, "skip:0,2").generate(ids, **GREEDY, stopping_criteria=[_Broken()])
    assert find_stack(model).layers is layers
    assert not any(layer._forward_hooks for layer in layers)
    assert torch.equal(model(ids).logits, before)


def test_confidence_shortens_drafts() -> None:
    drafted = []
    for confidence in (None, "auto", 1.0):
        speculator = Speculator(weak("llama"), "exit:2", length=4, confidence=confidence)  # type: ignore[arg-type]
        speculator.generate(prompt(), **GREEDY)
        drafted.append(speculator.stats.drafted / speculator.stats.rounds)
    assert drafted[0] > drafted[1]
    assert drafted[0] > 2
    assert drafted[2] <= 1


def test_layers_that_never_draft_right_rest_longer_and_longer() -> None:
    length, rounds, drafted = Length(4, "auto"), 200, 0
    for _ in range(rounds):
        if not length.rests():
            drafted += 1
            length.update(4, 0)
    assert 2 < drafted < 12
    length.update(4, 4)
    assert length.rest == 4
    always = Length(4, None)
    for _ in range(rounds):
        always.update(4, 0)
        assert not always.rests()


def test_a_hopeless_draft_costs_little_more_than_plain_decoding() -> None:
    speculator = Speculator(tiny("llama"), "exit:1", length=4)
    asked = GREEDY | {"max_new_tokens": 100}
    assert torch.equal(speculator.generate(prompt(), **asked), tiny("llama").generate(prompt(), **asked))
    assert speculator.stats.drafted < 30


@pytest.mark.parametrize("draft", ["exit:2", "exit:3", "lookup:1"])
@pytest.mark.parametrize("length", [1, 3])
def test_what_is_foreseen_is_what_happens(draft: str, length: int) -> None:
    """An exit draft reads the base model's own rows, so one pass over the text shows its drafts exactly."""
    model = weak("llama")
    speculator = Speculator(model, draft, length=length, confidence=None)
    told = [SampleText(model.generate(prompt(8, seed), max_new_tokens=30, do_sample=False), 8) for seed in range(3)]
    drafted = accepted = rounds = 0
    for one in told:
        speculator.generate(one.ids[:, :8], max_new_tokens=30, do_sample=False)
        stats = speculator.stats
        drafted, accepted, rounds = drafted + stats.drafted, accepted + stats.accepted, rounds + stats.rounds
    recipe = speculator.recipe
    steps = recipe.chooser.begin(speculator.runner.spec) if recipe.chooser is not None else ()
    with speculator.runner as runner, torch.no_grad():
        forecast = Forecast(runner, told)
        times = forecast.time_base(1)
        hits = forecast.hits(steps) if steps else None
        found = predict_speed(
            DraftSetting(steps, recipe.finder, length), told, hits, times, 1.0, len(steps), runner.depth
        )
    assert found[1:] == pytest.approx((accepted / drafted, 3 * 29 / rounds))


def test_peft_and_prefixed_names_are_looked_through() -> None:
    import copy

    from peft import LoraConfig, get_peft_model

    model: PreTrainedModel = copy.deepcopy(weak("llama"))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=4))
    expected = wrapped.generate(input_ids=prompt(), **GREEDY)
    assert torch.equal(Speculator(wrapped, "exit:2").generate(prompt(), **GREEDY), expected)
