"""Every row of the table of what `generate` can be asked under a plan: right, or refused before the first token; and
the model is whole again behind the block, whatever left it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shoal.errors import ShoalError, ShoalWarning
from shoal.live import running
from shoal.plan.answers import Refused
from shoal.plan.generate_ways import WAYS, Unchanged
from shoal.writing.surgery import rewrite

from .families import tiny
from .generating import ASKS, GREEDY_TEXT, PROMPT, Collecting, face, loop, plain, same
from .live_models import own, plan_of

PLAN, SKIPPING, SKIPPED = "0,1x2,3", "skip:listed=1,phase=both", "0,2-3"
EAGER = ("attentions",)
PROMPT_MATTERS = ("prompt lookup", "assistant itself", "custom decoding", "static cache", "own cache", "no cache")


def _attention(name: str) -> str:
    return "eager" if name in EAGER else "sdpa"


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], Any]:
    """By attention and plan, the live model and the stock model of the same plan."""
    found: dict[tuple[str, str], Any] = {}
    for attention in ("sdpa", "eager"):
        model = own("llama", attention)
        model(PROMPT["input_ids"], output_hidden_states=True)  # transformers' hooks are there from now on
        torch.compile(model, backend="eager")  # and what torch leaves on a model
        for plan in (PLAN, SKIPPED, "0,2,3"):
            stock = rewrite(model, plan_of(model, plan))
            stock.set_attn_implementation(attention)
            stock.generation_config = copy.deepcopy(model.generation_config)
            found[attention, plan] = model, stock
    return found


def _refused(model: PreTrainedModel, name: str, answer: Any) -> None:
    streamer = Collecting()
    with pytest.raises(ShoalError) as caught:
        ASKS[name](model) if name != "early exit" else plain(model, assistant_early_exit=2, streamer=streamer)
    constant = [piece.partition("}")[2] for piece in ("}" + answer.sentence).split("{")]
    assert caught.value.code == answer.code
    assert [text for text in constant if text not in str(caught.value)] == []
    assert streamer.seen == [], "nothing was written"


def _asked(live: PreTrainedModel, stock: PreTrainedModel, name: str, answer: Any) -> None:
    """`live` runs a plan, `stock` is its written model."""
    if isinstance(answer, Refused):
        _refused(live, name, answer)
    elif isinstance(answer, Unchanged):
        with pytest.raises(ValueError, match="trust_remote_code") as without:
            ASKS[name](stock)
        with pytest.raises(ValueError, match="trust_remote_code") as caught:
            ASKS[name](live)
        assert str(caught.value) == str(without.value)
    else:
        found = ASKS[name](live)
        assert same(found, GREEDY_TEXT.get(name, ASKS[name])(stock))


@pytest.mark.parametrize("name", WAYS)
def test_what_is_asked_under_a_plan_is_what_the_table_says(models: dict[Any, Any], name: str) -> None:
    plan = "0,2,3" if name == "continuous batching" else PLAN
    live, stock = models[_attention(name), plan]
    before = face(live)
    with running(live, plan):
        _asked(live, stock, name, WAYS[name].plan)
    assert face(live) == before


@pytest.mark.parametrize("name", WAYS)
def test_what_is_asked_under_a_policy_is_what_the_table_says(models: dict[Any, Any], name: str) -> None:
    live, stock = models[_attention(name), SKIPPED]
    before = face(live)
    word = pytest.warns(ShoalWarning, match="compile_config") if name == "compiled" else nullcontext()
    with running(live, "0-3", policy=SKIPPING), word:
        _asked(live, stock, name, WAYS[name].policy)
    assert face(live) == before


@pytest.mark.parametrize("name", PROMPT_MATTERS)
def test_a_policy_that_looks_at_tokens_writes_the_same_text(models: dict[Any, Any], name: str) -> None:
    live, _ = models["sdpa", PLAN]
    with running(live, "0-3", policy="exit:confidence=0.05,first=1") as handle:
        expected = loop(live, PROMPT["input_ids"], None, None, None)
        assert torch.equal(expected, plain(tiny("llama"))), "without a word where the prompt ends all is prompt"
        handle.prompt = PROMPT["input_ids"].shape[1]
        expected = loop(live, PROMPT["input_ids"], None, None, None)
        assert not torch.equal(expected, plain(tiny("llama"))), "somebody leaves early"
        handle.prompt = None
        assert torch.equal(plain(live), expected)
        assert same(ASKS[name](live), GREEDY_TEXT[name](live))
        assert handle.prompt is None


def test_the_table_and_what_is_asked_here_have_the_same_rows() -> None:
    assert set(ASKS) == set(WAYS) and set(GREEDY_TEXT) < set(WAYS)
