"""Sampled drafts leave the base model's distribution; a bias that is planted is found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from shoal.live import running
from shoal.speculating import loop
from shoal.speculating.accept import accept_one_of, accept_or_resample, pick
from shoal.speculating.speculator import Speculator

from .drafting import prompt, weak
from .shares import every

VOCAB, DRAWS = 5, 20_000
WARPED = LogitsProcessorList([TemperatureLogitsWarper(1.4), TopKLogitsWarper(4), TopPLogitsWarper(0.97)])
Scores = dict[tuple[int, ...], torch.Tensor]
Verdict = Callable[..., tuple[int, bool]]


def small() -> PreTrainedModel:
    """Two layers, five tokens: all texts of three tokens can be counted."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.5)
    model.generation_config.eos_token_id = None
    return model


START = (1, 3, 2)


@torch.no_grad()
def _scores(model: PreTrainedModel, processors: LogitsProcessorList) -> Scores:
    """Processed scores behind every text of up to two more tokens."""
    texts = [START + more for n in range(3) for more in product(range(VOCAB), repeat=n)]
    out = {}
    for text in texts:
        ids = torch.tensor([text])
        out[text[len(START) :]] = processors(ids, model(ids).logits[:, -1].float())
    return out


def expected(target: Scores, length: int) -> dict[tuple[int, ...], float]:
    """The base model's probability of each text of `length` more tokens."""
    return {
        text: float(torch.stack([target[text[:n]].softmax(-1)[0, text[n]] for n in range(length)]).prod())
        for text in product(range(VOCAB), repeat=length)
    }


def p_value(counts: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    total = sum(counts.values())
    possible = [text for text, chance in chances.items() if chance > 0]
    assert sum(counts[text] for text in possible) == total, "a text was drawn that the base model never draws"
    whole = sum(chances.values())  # one, but for the rounding of float32
    return float(chisquare([counts[t] for t in possible], [total * chances[t] / whole for t in possible]).pvalue)


def _drawn(target: Scores, draft: Scores, judge: Verdict, draws: int = DRAWS) -> Counter[tuple[int, ...]]:
    """Two tokens drafted and judged, `draws` times, with the scores of both models looked up."""
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(draws):
        first = pick(draft[()], True)
        second = pick(draft[first[0],], True)
        one, stands = judge(target[()], first[0], first[1], True)
        two, _ = judge(target[one,], *second, True) if stands else judge(target[one,], None, None, True)
        counts[one, two] += 1
    return counts


def _biased(scores: torch.Tensor, token: int | None, drawn_from: torch.Tensor | None, sample: bool) -> tuple[int, bool]:
    """Accepts a little too readily."""
    if token is not None and float(torch.rand(())) < 0.1:
        return token, True
    return accept_or_resample(scores, token, drawn_from, sample)


@pytest.mark.parametrize("processors", every(2, [LogitsProcessorList(), WARPED]), ids=["plain", "warped"])
def test_accepting_or_resampling_leaves_the_base_models_distribution(processors: LogitsProcessorList) -> None:
    model = small()
    target = _scores(model, processors)
    with running(model, "0"):
        draft = _scores(model, processors)
    chances = expected(target, 2)
    assert abs(target[()].softmax(-1) - draft[()].softmax(-1)).max() > 0.05, "the draft must differ"
    torch.manual_seed(0)
    assert p_value(_drawn(target, draft, accept_or_resample, 6000 if len(processors) else DRAWS), chances) > 0.001
    if not len(processors):
        assert p_value(_drawn(target, draft, _biased, 5000), chances) < 1e-6


def test_a_token_that_was_looked_up_is_accepted_as_often_as_the_base_model_draws_it() -> None:
    target = _scores(small(), LogitsProcessorList())
    torch.manual_seed(0)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(DRAWS):
        counts[(accept_or_resample(target[()], 3, None, True)[0],)] += 1
    assert p_value(counts, expected(target, 1)) > 0.001


def test_equal_distributions_never_reject() -> None:
    scores = torch.tensor([[0.3, -1.0, 2.0]])
    for _ in range(200):
        token, chances = pick(scores, True)
        assert accept_or_resample(scores, token, chances, True) == (token, True)


def test_sampling_by_the_whole_model_accepts_everything() -> None:
    speculator = Speculator(weak("llama"), "exit:4", confidence=None)
    torch.manual_seed(0)
    out = speculator.generate(prompt(), max_new_tokens=30, do_sample=True, temperature=0.7, top_k=20, top_p=0.9)
    assert out.shape == (1, 40)
    assert speculator.stats.acceptance is not None
    # draft and verification round differently, so one ratio in many is a hair below one
    assert speculator.stats.acceptance > 0.99


def drawn_by_generating(model: PreTrainedModel, draft: str, draws: int) -> Counter[tuple[int, ...]]:
    """Texts of three tokens from `generate` itself."""
    speculator = Speculator(model, draft, length=2, confidence=None, count=False)
    counts: Counter[tuple[int, ...]] = Counter()
    ids = torch.tensor([START])
    mask = torch.ones_like(ids)
    for _ in range(draws):
        out = speculator.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=True, top_k=0)
        counts[tuple(out[0, len(START) :].tolist())] += 1
    return counts


def test_the_loop_samples_by_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few draws, which suffice against a large bias; the slow test makes 20,000."""
    model = small()
    chances = expected(_scores(model, LogitsProcessorList()), 3)
    torch.manual_seed(0)
    grouped = {first: sum(c for t, c in chances.items() if t[1:] == first) for first in product(range(VOCAB), repeat=2)}

    def value() -> float:
        counts: Counter[tuple[int, ...]] = Counter()
        for text, n in drawn_by_generating(model, "exit:1", 250).items():
            counts[text[1:]] += n
        return p_value(counts, grouped)

    assert value() > 0.001
    monkeypatch.setattr(
        loop,
        "accept_one_of",
        lambda s, drafted, sample: (drafted[0][0], 0) if drafted else accept_one_of(s, drafted, sample),
    )
    assert value() < 0.001
