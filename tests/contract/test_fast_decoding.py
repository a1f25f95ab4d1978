"""The fast decode path gives the tokens of generate: families, plans, processors, sampling, batches, menus."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from shoal.decoding.fast import FastDecoder
from shoal.decoding.fast_legal import refuse_difference
from shoal.errors import PlanError, UsageError
from shoal.live import running

from .families import tiny
from .shares import every, pairs

PLAIN = ("llama", "gpt2", "phi3", "gpt_neox", "opt", "olmo2", "granite", "smollm3")
OTHERS = ("qwen2", "gemma2", "mistral", "mixtral", "falcon", "bloom", "mamba2", "jamba")
"""Windows, mixtures, biases by distance, running states."""
PLANS = ("0,2-3", "0,2,1,3", "0-1,1x2,3", "0,1a,2m,3", "0-1,2@1,3", "0,(1|2),3")
NEW = 12


def model_of(family: str) -> Any:
    try:
        return tiny(family)
    except ValueError:  # a family without SDPA
        return tiny(family, "eager")


def prompt(batch: int = 1, length: int = 5) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(7))


def padded() -> dict[str, torch.Tensor]:
    ids, mask = prompt(2, 6), torch.ones(2, 6, dtype=torch.long)
    ids[1, :3], mask[1, :3] = 0, 0
    return {"inputs": ids, "attention_mask": mask}


def greedy(length: int = NEW) -> dict[str, Any]:
    return {"max_new_tokens": length, "do_sample": False}


class Pieces(BaseStreamer):
    def __init__(self) -> None:
        self.put_: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.put_.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("family", every(2, PLAIN + OTHERS))
def test_the_thin_loop_gives_the_tokens_of_generate(family: str) -> None:
    model = model_of(family)
    fast = FastDecoder(model, mode="off")
    assert torch.equal(fast.generate(prompt(), **greedy(30)), model.generate(prompt(), **greedy(30)))
    assert torch.equal(fast.generate(**padded(), **greedy()), model.generate(**padded(), **greedy()))


@pytest.mark.parametrize("family", every(5, [*PLAIN[:3], "qwen2", "gemma2"]))
def test_captured_layers_give_the_tokens_of_generate(family: str) -> None:
    """The layers go through the compiler's capture, with a cache of one row each; only the code it would make is left
    out. Windows of 6 tokens are left behind."""
    model = model_of(family)
    fast = FastDecoder(model, mode="layers", backend="eager")
    assert torch.equal(fast.generate(prompt(), **greedy()), model.generate(prompt(), **greedy()))
    assert torch.equal(fast.generate(**padded(), **greedy()), model.generate(**padded(), **greedy()))
    assert len(fast.compiled) == 2


@pytest.mark.parametrize(("plan", "mode"), pairs(2, PLANS, ["off", "layers"]))
def test_plans(plan: str, mode: Any) -> None:
    model = model_of("llama")
    fast = FastDecoder(model, plan, mode=mode, backend="eager")
    with running(model, plan):
        want, both = model.generate(prompt(), **greedy()), model.generate(**padded(), **greedy())
        inside = FastDecoder(model, mode="off").generate(prompt(), **greedy())
    assert torch.equal(fast.generate(prompt(), **greedy()), want)
    assert torch.equal(fast.generate(**padded(), **greedy()), both)
    assert torch.equal(inside, want)
    assert not torch.equal(want, model.generate(prompt(), **greedy()))


def test_a_menu_is_switched_without_compiling_again() -> None:
    model = model_of("llama")
    menu = {"all": "0-3", "few": "0,3", "mixed": "0,2@0,1,3"}
    fast = FastDecoder(model, menu, mode="layers", backend="eager")
    assert fast.plans == list(menu)
    made: dict[str, torch.Tensor] = {}
    for name in ("all", "few", "mixed", "all", "mixed", "few"):
        with running(model, menu[name]):
            want = model.generate(prompt(), **greedy())
        assert torch.equal(fast.generate(prompt(), plan=name, **greedy()), want), name
        made.setdefault(name, want)
    assert len({tuple(tokens[0].tolist()) for tokens in made.values()}) == 3
    torch._dynamo.utils.counters.clear()
    for name in menu:
        fast.generate(prompt(length=4), plan=name, **greedy())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert len(fast._calls) == 1


@pytest.mark.parametrize("mode", ["off", "layers"])
def test_processors_stops_and_samples(mode: Any) -> None:
    model = model_of("llama")
    fast = FastDecoder(model, mode=mode, backend="eager")
    free = model.generate(prompt(2), **greedy())
    own = {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)])}
    want = model.generate(prompt(2), **own, **greedy())
    assert torch.equal(fast.generate(prompt(2), **own, **greedy()), want)
    assert not torch.equal(want, free)
    ends = {"eos_token_id": [int(free[0, 8]), int(free[1, 10])], "pad_token_id": 0, **greedy()}
    want = model.generate(prompt(2), **ends)
    assert torch.equal(fast.generate(prompt(2), **ends), want)
    assert want.shape[1] < free.shape[1]
    shortest = {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(14, ends["eos_token_id"])])}
    assert torch.equal(fast.generate(prompt(2), **shortest, **ends), model.generate(prompt(2), **shortest, **ends))
    for drawn in ({"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "num_return_sequences": 3}):
        found = []
        for decode in (model.generate, fast.generate):
            torch.manual_seed(3)
            found.append(decode(prompt(2), max_new_tokens=NEW, do_sample=True, **drawn))
        assert torch.equal(*found), drawn


class After(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 9)


def test_streamer_and_stopping_criteria() -> None:
    model = model_of("llama")
    seen = []
    for decode in (model.generate, FastDecoder(model, mode="off").generate):
        pieces = Pieces()
        tokens = decode(prompt(), streamer=pieces, stopping_criteria=StoppingCriteriaList([After()]), **greedy())
        assert tokens.shape[1] == 9
        seen.append((pieces.put_, pieces.ended))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) == 5


def test_the_model_is_as_it_was() -> None:
    model = copy.deepcopy(model_of("llama"))
    before = [type(module) for module in model.modules()]
    fast = FastDecoder(model, "0,2-3", mode="layers", backend="eager")
    with pytest.raises(ZeroDivisionError):
        fast.generate(prompt(), stopping_criteria=StoppingCriteriaList([_Fails()]), **greedy())
    assert [type(module) for module in model.modules()] == before
    assert all(module._compiled_call_impl is None for module in model.modules())
    with running(model, "0,2-3"):
        want = model.generate(prompt(), **greedy())
    assert torch.equal(fast.generate(prompt(), **greedy()), want)


class _Fails(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        raise ZeroDivisionError


def test_auto_says_why_it_does_not_compile() -> None:
    fast = FastDecoder(model_of("mamba2"))
    assert (fast.mode, "running state" in str(fast.why_off)) == ("off", True)
    with pytest.raises(UsageError, match=r"U563.*running state"):
        FastDecoder(model_of("mamba2"), mode="layers")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "U562.*beam search"),
        ({"assistant_model": object()}, "U562.*assistant_model"),
        ({"prompt_lookup_num_tokens": 2}, "U562.*assisted"),
        ({"return_dict_in_generate": True}, "U562.*return_dict"),
        ({"use_cache": False}, "U562.*use_cache"),
        ({"guidance_scale": 2.0}, "U562.*guidance_scale"),
        ({"stop_strings": "x"}, "U562.*stop_strings"),
        ({"cache_implementation": "static"}, "U562.*cache_implementation"),
        ({"plan": "small"}, "U566.*small"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FastDecoder(model_of("llama"), mode="off").generate(prompt(), max_new_tokens=2, **arguments)


def test_refused_models_menus_and_plans() -> None:
    model = model_of("llama")
    with pytest.raises(UsageError, match=r"U565.*no plan"):
        FastDecoder(model, {})
    with pytest.raises(UsageError, match=r"U565.*'fully'"):
        FastDecoder(model, mode="fully")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"U566.*few"):
        FastDecoder(model, {"few": "0,3"}, mode="off").generate(prompt(), max_new_tokens=2)
    with pytest.raises(UsageError, match=r"U563.*training mode"):
        FastDecoder(copy.deepcopy(model).train())
    with pytest.raises(PlanError, match=r"P103"):
        FastDecoder(model, "0,9")
    fast = FastDecoder(model, "0,3", mode="off")
    with running(model, "0-2"), pytest.raises(PlanError, match=r"P122"):
        fast.generate(prompt(), max_new_tokens=2)


def test_a_step_that_is_not_the_models_own_is_refused() -> None:
    want = torch.tensor([[1.0, -4.0]])
    assert refuse_difference(want, want + 1e-4) == pytest.approx(2.5e-5, rel=0.01)
    for have in (want + 0.1, want * float("nan")):
        with pytest.raises(UsageError, match=r"U564"):
            refuse_difference(want, have)
