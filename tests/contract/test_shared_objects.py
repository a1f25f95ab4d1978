"""One object that two use: what one of them does or learns does not reach the other, and nothing outlives its model."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.fitting.lens import _add, _normal
from shoal.models.calls import named_arguments
from shoal.models.inspect import inspect
from shoal.models.parts import _Stub
from shoal.plan import Plan, drop
from shoal.record import environment
from shoal.speculating.parse import parse_draft
from shoal.speculating.speculator import Speculator
from shoal.writing.surgery import rewrite

from .drafting import prompt
from .families import tiny


def deep(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(layers)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **shape)).eval()


@pytest.mark.parametrize("text", ["knapsack:every=2", "swift:window=4;fraction=0.3", "lookup:1+clasp:skip=1;every=1"])
def test_a_draft_object_serves_models_of_different_depth(text: str) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    draft = parse_draft(text, inspect(deep(4)))
    for layers in (4, 6, 4):
        model = deep(layers)
        speculator = Speculator(model, draft)
        assert torch.equal(speculator.generate(prompt(), **asked), model.generate(prompt(), **asked))
        prepared = [run.layer for steps in speculator.runner.prepared for run in steps]
        assert max(prepared) == layers - 1, "the draft is one of this model"


def test_the_generation_config_of_a_rewritten_model_is_its_own() -> None:
    model = copy.deepcopy(tiny("llama"))
    smaller = rewrite(model, drop(Plan.identity(inspect(model)), [1]))
    before = model.generation_config.to_dict()
    smaller.generation_config.max_new_tokens = 7
    assert model.generation_config.to_dict() == before


def test_what_is_known_of_the_machine_is_handed_out_as_a_copy() -> None:
    environment()["python"] = "mine"
    assert environment()["python"] != "mine"


@pytest.mark.parametrize("ask", [lambda m, x: named_arguments(m, (x,), {}), lambda m, x: _Stub(m, 0, False)(x)])
def test_a_module_that_accelerate_has_wrapped_is_not_kept(ask: Any) -> None:
    module = nn.Linear(2, 2)
    add_hook_to_module(module, ModelHook())
    ask(module, torch.ones(1, 2))
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_a_lens_is_fitted_on_states_of_two_devices() -> None:
    """The last state may be on another device than the exit: a tensor on `meta` stands for one that must be moved."""
    sums = _normal(torch.zeros(1, 3, device="meta"))
    _add(sums, torch.ones(2, 3, device="meta"), torch.ones(2, 3))
    assert sums.count == 2
