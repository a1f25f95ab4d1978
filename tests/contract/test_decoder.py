"""The one way from a prompt to tokens gives the tokens of generate, whatever runs on the model, and says what wrote."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

import shoal.decoding.decoder as decoder_module
from shoal.decoding.arguments import GREEDY, GREEDY_ALONE, sampling
from shoal.decoding.decoder import Decoder
from shoal.decoding.fast import FastDecoder, fast_generate
from shoal.live import running

from .families import tiny
from .test_fast_decoding import Pieces, model_of, padded, prompt

ASKED = {"max_new_tokens": 12}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "bloom", "mamba2"])
def test_greedy_and_sampled_tokens_are_those_of_generate(family: str) -> None:
    model = model_of(family)
    decoder = Decoder(model)
    for how in (GREEDY, GREEDY_ALONE, sampling(0.7), sampling(1.3, top_p=0.8, top_k=0)):
        pieces = Pieces(), Pieces()
        torch.manual_seed(3)
        want = model.generate(prompt(), streamer=pieces[0], **ASKED | how)
        torch.manual_seed(3)
        assert torch.equal(decoder.generate(prompt(), streamer=pieces[1], **ASKED | how), want)
        assert pieces[0].put_ == pieces[1].put_ and pieces[1].ended == 1
        assert decoder.why_not_thin is None
    assert torch.equal(decoder.generate(**padded(), **ASKED | GREEDY), model.generate(**padded(), **ASKED | GREEDY))


def test_no_temperature_takes_the_likeliest_token() -> None:
    assert sampling(0.0) == sampling(1e-5, top_p=0.5) == GREEDY
    one_text = {"num_beams": 1, "num_return_sequences": 1}
    assert sampling(0.5, top_k=0) == {"do_sample": True, "temperature": 0.5, "top_k": 0} | one_text


@pytest.mark.parametrize("policy", ["exit:confidence=0.02", "exit:after=2", "unified:speedup=1.3"])
def test_policies_decide_in_the_thin_loop_as_in_generate(policy: str) -> None:
    model = tiny("llama")
    found = []
    for generate in (model.generate, Decoder(model).generate):
        with running(model, "0-3", policy=policy) as handle:
            found.append((generate(prompt(), **ASKED | GREEDY).tolist(), handle.trace.depths))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation"),
    ],
)
def test_what_the_thin_loop_cannot_is_left_to_generate(asked: dict[str, Any], why: str) -> None:
    model = tiny("llama")
    decoder = Decoder(model)
    want = model.generate(prompt(), **ASKED | GREEDY | asked)
    got = decoder.generate(prompt(), **ASKED | GREEDY | asked)
    assert torch.equal(*(one if torch.is_tensor(one) else one.sequences for one in (got, want)))
    assert why in str(decoder.why_not_thin)


def test_the_models_own_config_and_generate_are_heeded() -> None:
    model = copy.deepcopy(tiny("llama"))
    decoder = Decoder(model)
    model.generation_config.num_beams = 2
    assert torch.equal(decoder.generate(prompt(), **ASKED), model.generate(prompt(), **ASKED))
    assert "beam search" in str(decoder.why_not_thin)
    model.generation_config.num_beams = 1
    with fast_generate(model, mode="off"):
        decoder.generate(prompt(), **ASKED)
        assert "generate of its own" in str(decoder.why_not_thin)
    decoder.generate(prompt(), **ASKED)
    assert decoder.why_not_thin is None
    model.train()
    decoder.generate(prompt(), **ASKED)
    assert "evaluation mode" in str(decoder.why_not_thin)


def test_layers_are_compiled_before_the_first_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "FastDecoder", partial(FastDecoder, mode="layers", backend="eager"))
    monkeypatch.setattr(decoder_module, "LONGEST", 512)
    model = tiny("llama")
    with running(model, "0,2-3"):
        decoder = Decoder(model, compiled=True)
        decoder.prepare(300)
        made = decoder.compiled.compiled
        assert [one.length for one in made.values()] == [256, 512] and decoder.longest == 512
        seen = list(made)
        for new in (12, 300):
            asked = GREEDY | {"max_new_tokens": new, "stopping_criteria": [_After(20)]}
            assert torch.equal(decoder.generate(prompt(), **asked), model.generate(prompt(), **asked))
            assert (decoder.why_not_compiled, list(made)) == (None, seen)
        asked = GREEDY | {"max_new_tokens": 600, "stopping_criteria": [_After(20)]}
        assert torch.equal(decoder.generate(prompt(), **asked), model.generate(prompt(), **asked))
        assert "605 tokens are more than the 512" in str(decoder.why_not_compiled)
        assert (decoder.why_not_thin, list(made)) == (None, seen)


class _After:
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full(ids.shape[:1], ids.shape[1] >= self.length)
