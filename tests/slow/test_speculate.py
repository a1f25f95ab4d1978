"""Self-speculation over many draws and many prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chi2

from shoal.api.prompts import BUILTIN, encoded
from shoal.api.speculate import tune_draft
from shoal.speculating.speculator import Speculator

from ..contract.test_speculate_sampling import START, VOCAB, small

REAL = (
    "exit:8",
    "skip:0-11,14-29",
    "attention:18-25",
    "lookup",
    "swift",
    "cosine",
    "clasp:skip=3",
    "knapsack",
    "dynamic-exit",
    "lookup+exit:20",
    "exit:20+tree:3x2x1",
    "swift+tree",
    "s3d:skip=13,tokens=3",
)

ASKED: dict[str, Any] = {"max_new_tokens": 128, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("draft", ["exit:1", "skip:1", "lookup:1+exit:1", "exit:1+tree:2x2", "s3d:skip=1,tokens=3"])
def test_twenty_thousand_generated_tokens_have_the_base_models_distribution(draft: str) -> None:
    """Without attention the next token depends on the last one alone, so every token of a long text is a draw."""
    model = small()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        chances = model(torch.arange(VOCAB)[:, None]).logits[:, -1].softmax(-1)
    speculator = Speculator(model, draft, length=3, confidence=None, count=False)
    torch.manual_seed(0)
    counts = torch.zeros(VOCAB, VOCAB)
    for _ in range(80):
        ids = torch.tensor([START])
        asked = {"max_new_tokens": 250, "do_sample": True, "top_k": 0}
        text = speculator.generate(ids, attention_mask=torch.ones_like(ids), **asked)[0, len(START) - 1 :]
        counts.index_put_((text[:-1], text[1:]), torch.ones(len(text) - 1), accumulate=True)
    assert counts.sum() == 20_000
    assert speculator.stats.acceptance is not None
    assert 0.1 < speculator.stats.acceptance < 0.95
    foreseen = chances * counts.sum(-1, keepdim=True)
    statistic = float(((counts - foreseen) ** 2 / foreseen).sum())
    assert chi2.sf(statistic, VOCAB * (VOCAB - 1)) > 0.001


@pytest.fixture(scope="module")
def answered(smollm2: Any) -> list[tuple[Any, torch.Tensor]]:
    """Fifty prompts, the built-in ones and how to begin, with what plain decoding writes: 128 tokens or to the end."""
    texts = [text for kind in BUILTIN.values() for text in kind]
    prompts = [f"{text}\n\nAnswer as number {n}." for n in range(9) for text in texts][:50]
    inputs = [encoded(smollm2, text, None) for text in prompts]
    return [(one, smollm2.model.generate(**one, **ASKED)) for one in inputs]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("draft", REAL)
def test_fifty_prompts_are_answered_token_for_token(
    smollm2: Any, answered: list[tuple[Any, torch.Tensor]], draft: str
) -> None:
    speculator = Speculator(smollm2.model, draft, count=False)
    wrong = []
    for number, (inputs, plain) in enumerate(answered):
        if not torch.equal(speculator.generate(**inputs, **ASKED), plain):
            wrong.append((number, speculator.stats.close_calls))
    assert not wrong


@pytest.mark.timeout(1800)
def test_the_tuner_says_what_it_found(smollm2: Any) -> None:
    found = tune_draft(smollm2, [BUILTIN["code"][1]], new=16, finalists=2, pairs=1, few=True, also=["exit:2"])
    assert [v.different for v in found.verified] == [0, 0, 0]
    assert found.verified[-1].draft == "exit:2"
    assert (found.draft is None) == found.verdict.startswith("do not use it here")
    assert found.foreseen == sorted(found.foreseen, key=lambda row: -row["speedup"])
