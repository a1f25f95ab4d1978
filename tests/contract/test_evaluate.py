"""Evaluation against naive references: perplexity, agreement, generation, speed and memory on tiny random models."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from shoal.data import Data, DataInfo
from shoal.errors import DataError, UsageError
from shoal.evaluation import (
    compare,
    compare_between,
    generation_check,
    memory,
    perplexity,
    scoring,
    sequence_nll,
    speed,
)
from shoal.evaluation.agreement import compare_logits
from shoal.evaluation.decoding import Stepper
from shoal.evaluation.generation import repeated_ngrams
from shoal.evaluation.stats import Spread, ratio

VOCAB = 256


@pytest.fixture(scope="module")
def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    shape = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**shape, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def data_of(ids: torch.Tensor, *, stride: int | None = None, mask: torch.Tensor | None = None) -> Data:
    count, length = ids.shape
    return Data(ids, mask, DataInfo("random", "test", length, count, stride or length, "none", ids.numel(), "0" * 64))


def random_ids(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def naive_nll(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Minus the log probability of each token but the first of one sequence, float64 [length - 1]."""
    log_p = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    return torch.tensor([-log_p[t - 1, ids[t]] for t in range(1, len(ids))])


@contextmanager
def without_mlp(model: Any, layer: int = 1) -> Iterator[None]:
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    handle = blocks[layer].mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_perplexity_is_the_naive_one(model: Any, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 7 * VOCAB)
    ids = random_ids(5, 24)
    result = perplexity(model, data_of(ids), batch=batch)
    expected = torch.stack([naive_nll(model, row) for row in ids])
    assert result.nll == pytest.approx(expected.mean().item(), rel=1e-6)
    assert result.value == pytest.approx(math.exp(expected.mean().item()), rel=1e-5)
    assert result.tokens == 5 * 23
    assert result.per_sequence == pytest.approx(expected.mean(1).tolist(), rel=1e-6)
    assert result.error == pytest.approx(expected.mean(1).std().item() / math.sqrt(5), rel=1e-4)
    assert json.loads(json.dumps(result.to_dict()))["info"]["source"] == "random"


def test_overlapping_windows_count_each_token_once_with_the_most_context(model: Any) -> None:
    text = random_ids(1, 40)[0]
    length, stride = 16, 6
    windows = torch.stack([text[start : start + length] for start in range(0, len(text) - length + 1, stride)])
    total, scored = 0.0, []
    for position in range(1, len(text)):
        holding = [w for w in range(len(windows)) if w * stride < position < w * stride + length]
        if holding:
            first = holding[0]
            total += naive_nll(model, windows[first])[position - first * stride - 1].item()
            scored.append(position)
    result = perplexity(model, data_of(windows, stride=stride), batch=2)
    assert scored == list(range(1, len(text)))
    assert result.per_sequence_tokens == (15, 6, 6, 6, 6)
    assert result.tokens == len(scored)
    assert result.nll == pytest.approx(total / len(scored), rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_positions_do_not_count(model: Any, side: str) -> None:
    ids, short = random_ids(2, 20), 12
    mask = torch.ones_like(ids)
    padding = slice(0, 20 - short) if side == "left" else slice(short, 20)
    real = ids[1, 20 - short :] if side == "left" else ids[1, :short]
    ids[1, padding], mask[1, padding] = 0, 0
    (first, count), (second, short_count) = sequence_nll(model, data_of(ids, mask=mask), batch=2)
    assert (count, short_count) == (19, 11)
    assert first == pytest.approx(naive_nll(model, ids[0]).sum().item(), rel=1e-5)
    assert second == pytest.approx(naive_nll(model, real).sum().item(), rel=1e-5)
    empty = torch.zeros_like(ids)
    with pytest.raises(DataError, match="D420"):
        perplexity(model, data_of(ids, mask=empty))
    with pytest.raises(DataError, match="D420"):
        compare(model, data_of(ids, mask=empty), dense=nullcontext, pruned=nullcontext)


def test_the_model_comes_back_as_it_was(tiny_llama: Any) -> None:
    own = copy.deepcopy(tiny_llama).train()
    own.model.layers[2].eval()
    modes = [module.training for module in own.modules()]
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    data = data_of(random_ids(2, 8))
    perplexity(own, data)
    compare_between(own, tiny_llama, data)
    memory(own, prompt=4)
    assert [module.training for module in own.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in own.state_dict().items())
    assert all(parameter.grad is None for parameter in own.parameters())


def test_dropout_is_off_while_evaluating(tiny_gpt2: Any) -> None:
    own = copy.deepcopy(tiny_gpt2).train()
    data = data_of(random_ids(2, 16))
    assert perplexity(own, data) == perplexity(tiny_gpt2, data)
    assert compare(own, data, dense=nullcontext, pruned=nullcontext).agreement.kl == 0


def test_a_model_agrees_with_itself_exactly(model: Any) -> None:
    result = compare(model, data_of(random_ids(3, 16)), dense=nullcontext, pruned=nullcontext, batch=2).agreement
    assert (result.kl, result.kl_error, result.top1, result.top1_error, result.tokens) == (0, 0, 1, 0, 45)


def test_agreement_is_the_naive_one_and_both_forms_are_equal(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64: logits of batches of 4 and of 3 differ by rounding, which in float32 shows in a small KL."""
    model = copy.deepcopy(model).double()
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 5 * VOCAB)
    ids = random_ids(4, 16)
    with torch.no_grad():
        p = model(input_ids=ids).logits[:, :-1]
        with without_mlp(model):
            q = model(input_ids=ids).logits[:, :-1]
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    both = compare(model, data_of(ids), dense=nullcontext, pruned=lambda: without_mlp(model), batch=3)
    result = both.agreement
    assert both.dense == perplexity(model, data_of(ids))
    assert result.kl == pytest.approx(kl.mean().item(), rel=1e-9)
    assert result.kl > 0
    assert result.kl_error == pytest.approx(kl.mean(1).std().item() / 2, rel=1e-9)
    assert result.top1 == pytest.approx(same.mean().item())
    assert result.top1_error == pytest.approx(same.mean(1).std().item() / 2, abs=1e-9)
    other = copy.deepcopy(model)
    with without_mlp(other):
        assert compare_between(model, other, data_of(ids), batch=3) == both


def test_logits_that_cannot_be_compared_are_refused_and_impossible_tokens_add_nothing() -> None:
    dense = torch.tensor([[[1.0, 2.0, -torch.inf]]])
    pruned = torch.tensor([[[1.0, 2.0, 3.0]]])
    assert compare_logits(dense, dense)[0].item() == 0
    expected = -math.log((math.e + math.e**2) / (math.e + math.e**2 + math.e**3))
    assert compare_logits(dense, pruned)[0].item() == pytest.approx(expected)
    assert compare_logits(pruned, dense)[0].item() == math.inf
    with pytest.raises(UsageError, match="U511"):
        compare_logits(dense, pruned[..., :2])


def test_broken_models_give_inf_or_nan(tiny_llama: Any) -> None:
    broken = copy.deepcopy(tiny_llama)
    data = data_of(random_ids(2, 8))
    with torch.no_grad():
        broken.lm_head.weight *= 1e6
    assert perplexity(broken, data).value == math.inf
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    assert math.isnan(perplexity(broken, data).value)


def test_standard_error_and_spread() -> None:
    assert ratio([6.0], [3]) == (2.0, None)
    assert ratio([6.0, 0.0], [3, 0]) == (2.0, None)
    mean, error = ratio([1.0, 4.0, 9.0], [1, 2, 3])
    assert mean == pytest.approx(14 / 6)
    residuals = [1 - 14 / 6, 4 - 2 * 14 / 6, 9 - 3 * 14 / 6]
    assert error == pytest.approx(math.sqrt(1.5 * sum(r * r for r in residuals)) / 6)
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, (3.0, 1.0, 2.0))


class Characters:
    """A tokenizer of one token a character, with or without a chat template."""

    eos_token_id = 2

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) % VOCAB for c in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


@torch.no_grad()
def naive_greedy(model: Any, ids: list[int], new: int) -> list[int]:
    for _ in range(new):
        ids = [*ids, int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
        if ids[-1] == Characters.eos_token_id:
            break
    return ids


@pytest.mark.parametrize("chat", [False, True])
def test_generation_is_greedy_whatever_the_checkpoint_says(
    model: Any, chat: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy.deepcopy(model)
    own.generation_config.update(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.7, num_beams=3
    )
    own.generation_config.update(no_repeat_ngram_size=2, max_length=9, min_new_tokens=3)
    settings = own.generation_config.to_dict()
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = Characters("a template")
    check = generation_check(own, tokenizer, ["hello", "a b"], new_tokens=12, chat=None if chat else False)
    assert check.chat is chat
    for generation in check.generations:
        text = f"<user>{generation.prompt}<assistant>" if chat else generation.prompt
        prompt = tokenizer(text, add_special_tokens=not chat)["input_ids"]
        expected = naive_greedy(model, prompt, 12)[len(prompt) :]
        ended = expected[-1] == tokenizer.eos_token_id
        expected = expected[:-1] if ended else expected
        assert generation.text == " ".join(map(str, expected))
        assert generation.ended is ended
        assert (generation.tokens, generation.distinct) == (len(expected), len(set(expected)))
        assert generation.repeated == repeated_ngrams(expected)
    assert check.mean_new_tokens == sum(g.tokens for g in check.generations) / 2
    assert own.generation_config.to_dict() == settings
    assert not caplog.records


def test_repetition_and_early_ends_are_counted(tiny_gpt2: Any) -> None:
    assert repeated_ngrams([1, 2, 3]) == 0
    assert repeated_ngrams([1, 2, 3, 4, 1, 2, 3, 4]) == 1
    assert repeated_ngrams([5] * 10) == 6
    own = copy.deepcopy(tiny_gpt2)
    with torch.no_grad():
        own.transformer.ln_f.weight.zero_()
        own.transformer.ln_f.bias.copy_(own.transformer.wte.weight[9] * 100)
    looping = generation_check(own, Characters(), ["ab", "c"], new_tokens=10)
    assert (looping.repetition, looping.distinct, looping.ended, looping.chat) == (6 / 7, 0.1, 0, False)
    with torch.no_grad():
        own.transformer.ln_f.bias.copy_(own.transformer.wte.weight[2] * 100)
    silent = generation_check(own, Characters(), ["ab", "c"], new_tokens=10)
    assert (silent.repetition, silent.distinct, silent.ended, silent.mean_new_tokens) == (0, 0, 1, 0)


def test_speed_pairs_the_variants_and_says_what_it_measured(model: Any) -> None:
    order: list[str] = []

    def variant(name: str) -> Any:
        @contextmanager
        def live() -> Iterator[Any]:
            order.append(name)
            yield model

        return live

    steps: list[tuple[int, int, str]] = []
    variants = {name: variant(name) for name in ("dense", "pruned")}
    result = speed(variants, prompt=8, new=3, batch=2, pairs=3, warmup=1, progress=lambda *s: steps.append(s))
    assert order == ["dense", "pruned", "pruned", "dense"] * 2
    assert steps == [(number, 8, "speed") for number in range(1, 9)]
    dense, pruned = result.variants
    assert (dense.name, pruned.name) == ("dense", "pruned")
    assert dense.prefill_ratio == dense.decode_ratio == Spread(1, 1, 1, (1, 1, 1))
    pairs = [p / d for p, d in zip(pruned.decode.samples, dense.decode.samples, strict=True)]
    assert pruned.decode_ratio == Spread.of(pairs)
    assert 0 < pruned.prefill.low <= pruned.prefill.median <= pruned.prefill.high
    facts = (result.device, result.dtype, result.batch, result.prompt, result.new, result.kind)
    assert facts == ("cpu", "float32", 2, 8, 3, "measured")
    assert result.threads == torch.get_num_threads()
    json.dumps(result.to_dict())


def test_the_timed_steps_are_real_cached_decoding(model: Any) -> None:
    ids, seen = random_ids(2, 10).tolist(), []
    step = Stepper(model)
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    try:
        with torch.no_grad():
            cache = step(torch.tensor(ids)[:, :8])
            for position in (8, 9):
                cache = step(torch.tensor(ids)[:, position : position + 1], position, cache)
    finally:
        handle.remove()
    with torch.no_grad():
        whole = model(input_ids=torch.tensor(ids)).logits
    for position, logits in zip((7, 8, 9), seen, strict=True):
        assert logits.shape[1] == 1
        torch.testing.assert_close(logits[:, -1], whole[:, position], atol=1e-4, rtol=1e-4)


def test_memory_is_arithmetic(tiny_llama: Any, tiny_gpt2: Any) -> None:
    weights = sum(parameter.numel() for parameter in tiny_llama.parameters()) * 4
    per_token = 4 * 2 * 2 * 8 * 4  # layers x (keys, values) x heads x head size x bytes
    result = memory(tiny_llama, prompt=10, batch=3)
    found = (result.weight_bytes, result.kv_bytes, result.kv_held_bytes, result.kv_bytes_per_token)
    assert found == (weights, 30 * per_token, 30 * per_token, per_token)
    assert (result.batch, result.prompt, result.device, result.dtype) == (3, 10, "cpu", "float32")
    # GPT-2 ties its output head to its embeddings: `parameters` counts it once, and so do the storages.
    tied = memory(copy.deepcopy(tiny_gpt2).to(torch.bfloat16), prompt=1)
    assert tied.weight_bytes == sum(parameter.numel() for parameter in tiny_gpt2.parameters()) * 2
    assert tied.kv_bytes == tied.kv_bytes_per_token == 3 * 2 * 32 * 2
    assert json.loads(json.dumps(tied.to_dict()))["dtype"] == "bfloat16"


def test_memory_of_windows_and_recurrent_states() -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    sliding = memory(MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=5)), prompt=12)
    row = 2 * 2 * 8 * 4
    assert sliding.kv_bytes_per_token == 2 * row
    assert sliding.kv_bytes == 2 * 4 * row
    assert sliding.kv_held_bytes == 2 * 12 * row
    recurrent = memory(MambaForCausalLM(MambaConfig(**shape, state_size=4, conv_kernel=3)), prompt=12, batch=2)
    assert recurrent.kv_bytes_per_token == 0
    assert recurrent.kv_bytes == 2 * 2 * 64 * (3 + 4) * 4
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_dt_rank": 4}
    config = JambaConfig(**shape, **heads, **layers)
    mixed = memory(JambaForCausalLM(config), prompt=12)
    assert mixed.kv_bytes_per_token == row
    assert mixed.kv_bytes > 12 * row


def test_mistakes_name_the_remedy(tiny_gpt2: Any) -> None:
    long = data_of(random_ids(1, 65))
    cases = [
        ("U510", lambda: perplexity(tiny_gpt2, long)),
        ("U510", lambda: compare(tiny_gpt2, long, dense=nullcontext, pruned=nullcontext)),
        ("U510", lambda: compare_between(tiny_gpt2, tiny_gpt2, long)),
        ("U510", lambda: generation_check(tiny_gpt2, Characters(), ["a"], new_tokens=64)),
        ("U510", lambda: speed({"dense": lambda: nullcontext(tiny_gpt2)}, prompt=64, new=1)),
        ("U510", lambda: memory(tiny_gpt2, prompt=65)),
        ("U512", lambda: generation_check(tiny_gpt2, Characters(), [])),
        ("U513", lambda: generation_check(tiny_gpt2, Characters(), ["a"], chat=True)),
        ("U514", lambda: speed({})),
        ("U514", lambda: memory(tiny_gpt2, prompt=0)),
        ("U514", lambda: memory(tiny_gpt2, batch=0)),
    ]
    for code, call in cases:
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.code == code


def test_progress_counts_windows_and_prompts(tiny_gpt2: Any) -> None:
    seen: list[tuple[int, int, str]] = []
    data = data_of(random_ids(3, 8))
    perplexity(tiny_gpt2, data, batch=2, progress=lambda *s: seen.append(s))
    compare_between(tiny_gpt2, tiny_gpt2, data, progress=lambda *s: seen.append(s))
    generation_check(tiny_gpt2, Characters(), ["a"], new_tokens=1, progress=lambda *s: seen.append(s))
    agreed = [(number, 3, "dense and pruned") for number in (1, 2, 3)]
    assert seen == [(2, 3, "perplexity"), (3, 3, "perplexity"), *agreed, (1, 1, "generation")]
