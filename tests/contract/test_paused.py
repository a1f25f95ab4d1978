"""A plan that is taken away for a while: the model is whole inside, as the teacher of the plan that learns."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import nn

import shoal
from shoal.errors import PlanError
from shoal.executing.bind import bind
from shoal.executing.recorder import Recorder
from shoal.models.inspect import inspect

from .families import tiny
from .kinds import kind
from .live_models import IDS, logits, own
from .test_live_training import checkpointing, gradients, in_training

TENSORS = {f"a.{name}": tensor * 1.3 for name, tensor in tiny("llama").model.layers[1].state_dict().items()} | {
    "map-1-2.weight": torch.eye(32) * 1.5
}
PLANS = ["0-1,3", "0,1a,2m,3", "0,1:a,2-3", "0-1,2@1,3", "0-1,2@a1,3", "0,~1-2,3", "0,(1|2),3", "0,1x2,2-3", "0,2,1,3"]


@pytest.mark.parametrize("plan", PLANS)
def test_a_paused_plan_leaves_the_dense_model_and_comes_back(plan: str) -> None:
    model = own("llama")
    inspect(model)  # what is known of a model is kept beside it
    layers, names, dense = model.model.layers, list(vars(model)), logits(model)
    text = model.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    with shoal.running(model, plan, TENSORS) as handle:
        planned = logits(model)
        assert not torch.equal(planned, dense)
        with handle.paused():
            assert model.model.layers is layers
            assert list(vars(model)) == names
            assert torch.equal(logits(model), dense)
            assert torch.equal(model.generate(IDS[:1], max_new_tokens=5, do_sample=False), text)
        assert torch.equal(logits(model), planned)
    assert torch.equal(logits(model), dense)


def test_every_stack_is_whole() -> None:
    model = copy.deepcopy(kind("t5"))
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    dense = logits(model, **batch)
    with shoal.running(model, "encoder: 0-1,3; decoder: 0,2-3") as handle:
        planned = logits(model, **batch)
        with handle.paused():
            assert torch.equal(logits(model, **batch), dense)
        assert torch.equal(logits(model, **batch), planned)
        assert not torch.equal(planned, dense)


HEAD = {"own-1.weight": torch.randn(64, 32, generator=torch.Generator().manual_seed(4))}
POLICIES: dict[str, tuple[str, dict[str, torch.Tensor]]] = {
    "project": ("exit:confidence=0.05,first=0", {}),
    "defer": ("exit:confidence=0.05,first=0,fill=defer", {}),
    "reads logits": ("unified", {}),
    "a head of its own": ("exit:after=1,prefill=true,head=own", HEAD),
    "half a layer": ("ffn-skip:cold_first=0,cold_last=1,threshold=0.5,prefill=true", {}),
    "listed": ("skip:listed=2", {}),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_hears_nothing_of_it(name: str) -> None:
    model, (policy, weights) = own("llama"), POLICIES[name]
    dense = logits(model)
    text = model.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    with shoal.running(model, "0-3", weights, policy=policy) as handle:
        planned = logits(model)
        for paused in (handle.paused, handle.bound.paused):
            told = copy.deepcopy((handle.trace.to_dict(), handle.deciding and handle.deciding.memory))
            with paused():
                assert torch.equal(logits(model), dense)
                assert torch.equal(model.lm_head(model.model(input_ids=IDS).last_hidden_state), dense)
                assert torch.equal(model.generate(IDS[:1], max_new_tokens=5, do_sample=False), text)
            assert (handle.trace.to_dict(), handle.deciding and handle.deciding.memory) == told
        assert handle.prompt is None
        assert torch.equal(logits(model), planned)


def test_whoever_records_the_plan_hears_nothing_of_it() -> None:
    class Maps(Recorder):
        count = 0

        def attends(self, layer: int, attention_map: torch.Tensor) -> None:
            self.count += 1

    model, maps = own("llama", "eager"), Maps()
    with bind(model, "0-1,3").running() as bound, bound.executor().recording(maps):
        logits(model)
        with bound.paused():
            logits(model)
        assert maps.count == 3


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("plan", ["0-1,3", "0,1:a,2-3", "0,1a,~2-2,3"])
def test_a_teacher_inside_a_training_step_changes_no_gradient(plan: str, checkpointed: bool) -> None:
    model = in_training("llama")
    dense, tensors = logits(model), TENSORS | {"map-2-2.weight": torch.eye(32) * 1.5}
    if checkpointed:
        checkpointing(model)
    with shoal.running(model, plan, tensors) as handle:
        alone = gradients(model)
        model.zero_grad()
        with handle.paused(), torch.no_grad():
            assert torch.equal(model(input_ids=IDS, use_cache=False).logits, dense)
        loss = model(input_ids=IDS, labels=IDS).loss
        with handle.paused():  # the teacher between forward and backward, and backward while it is the teacher's turn
            assert torch.equal(logits(model), dense)
            loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert alone.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in alone.items())


def test_pauses_may_be_nested_and_broken_off() -> None:
    model = own("llama")
    dense = logits(model)
    handle = shoal.apply(model, "0-1,3")
    planned = logits(model)
    with handle.paused():
        with pytest.raises(ZeroDivisionError), handle.paused():
            1 / 0  # noqa: B018
        assert torch.equal(logits(model), dense)
        with handle.bound.running():
            assert torch.equal(logits(model), planned)
            with handle.paused():
                assert torch.equal(logits(model), dense)
        assert torch.equal(logits(model), dense)
        with shoal.running(model, "0,3"):
            assert not torch.equal(logits(model), planned)
    assert torch.equal(logits(model), planned)
    with pytest.raises(ZeroDivisionError), handle.paused():
        1 / 0  # noqa: B018
    assert torch.equal(logits(model), planned)
    with handle.paused():
        handle.restore()
    assert torch.equal(logits(model), dense), "taken away inside, it stays away"
    with handle.paused():
        assert torch.equal(logits(model), dense)
    assert torch.equal(logits(model), dense)


def test_another_plan_put_on_the_model_inside_must_be_gone_at_the_end() -> None:
    model = own("llama")
    handle = shoal.apply(model, "0-1,3")
    with pytest.raises(PlanError) as caught, handle.paused():
        other = shoal.apply(model, "0,3")
    assert caught.value.code == "P122"
    planned = logits(model)
    handle.restore()
    assert torch.equal(logits(model), planned), "the other plan is still there"
    other.restore()
    assert isinstance(model.model.layers, nn.ModuleList)


def test_measures_run_while_a_plan_is_paused() -> None:
    model = own("llama")
    with shoal.running(model, "0-1,3") as handle, handle.paused():
        assert inspect(model) == inspect(tiny("llama"))


def test_a_pause_takes_less_than_a_millisecond_at_any_depth() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_hidden_layers=32, **sizes)).eval()
    taken = []
    with shoal.running(model, "0-20,25-31") as handle:
        for _ in range(20):
            start = time.perf_counter()
            with handle.paused():
                pass
            taken.append(time.perf_counter() - start)
    assert min(taken) < 1e-3
