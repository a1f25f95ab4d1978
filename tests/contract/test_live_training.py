"""A live plan while a model is trained, adapted by LoRA or offloaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedModel

from shoal.errors import PlanError
from shoal.live import apply, running
from shoal.models.inspect import inspect
from shoal.models.stacks import find_stack

from .families import tiny
from .live_models import IDS, logits, own, plan_of


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_training(family: str) -> PreTrainedModel:
    model = own(family)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "dropout" in module.__dict__ and isinstance(module.dropout, float):
            module.dropout = 0.0
    return model.train()


def checkpointing(model: PreTrainedModel) -> None:
    # the older name is the one that transformers 5.20 knows
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("family", ["llama", "gpt2", "jamba"])
@pytest.mark.parametrize(
    ("plan", "silent"),
    [("0-1,3", ("2.",)), ("0,1a,2-3", ("1.mlp.", "1.feed_forward.")), ("0,1x2,2-3", ()), ("0m,1-3", ("0.attn.",))],
)
def test_checkpointing_changes_no_gradient(family: str, plan: str, silent: tuple[str, ...]) -> None:
    model = in_training(family)
    prefix = find_stack(model).path + "."
    silent = (*silent, "0.self_attn.", "0.mamba.") if plan.startswith("0m") else silent
    with running(model, plan):
        plain = gradients(model)
        checkpointing(model)
        calls: list[int] = []
        child = next(c for n, c in find_stack(model).layer(1).named_children() if n in ("self_attn", "attn"))
        handle = child.register_forward_pre_hook(lambda *_: calls.append(1))
        again = gradients(model)
        handle.remove()
    assert len(calls) == (4 if "x2" in plan else 2), "the layer is replayed in backward"
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)
    missing = [n.removeprefix(prefix) for n, _ in model.named_parameters() if n not in plain and n.startswith(prefix)]
    norms = ("input_layernorm", "post_attention_layernorm", "pre_ff_layernorm", "ln_1", "ln_2")
    assert bool(missing) == bool(silent)
    assert all(name.startswith(silent) or name.split(".")[1] in norms for name in missing)
    ran = [n for n in plain if n.removeprefix(prefix).startswith(silent or "nothing")]
    assert ran == []


@pytest.mark.parametrize(("plan", "right"), [("0-1,3", True), ("0,1a,2-3", False), ("0-2,3@1", False)])
def test_a_wrapper_that_would_run_a_layer_again_without_its_plan_is_refused(plan: str, right: bool) -> None:
    model = in_training("llama")
    with running(model, plan) as handle:
        want = gradients(model)
        with handle.paused():  # as a trainer does that is given the model under a plan
            for index, layer in enumerate(model.model.layers):
                model.model.layers[index] = checkpoint_wrapper(layer)
        if right:
            assert all(
                torch.equal(want[n.replace("._checkpoint_wrapped_module", "")], g) for n, g in gradients(model).items()
            )
            return
        with pytest.raises(PlanError) as caught:
            gradients(model)
        assert caught.value.code == "P121"


def adapted(model: PreTrainedModel) -> Any:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("plan", ["0-1,3", "0,1x2,2-3", "0,1a,2-3", "0-2,3@1"])
def test_lora_before_and_after_the_plan(plan: str) -> None:
    first, second = own("llama"), own("llama")
    with running(first, plan):
        bare = logits(first)
    planned_first = apply(first, plan)
    before, after = adapted(first), adapted(second)
    with running(after, plan):
        assert torch.equal(logits(before), logits(after))
        assert not torch.equal(logits(after), bare)
        for model in (before, after):
            with model.disable_adapter():
                assert torch.equal(logits(model), bare)
        found = [gradients(model) for model in (before, after)]
    planned_first.restore()
    assert found[0].keys() == found[1].keys()
    assert all("lora_" in name and gradient.abs().max() > 0 for name, gradient in found[0].items())
    trained = {int(name.split(".layers.")[1].partition(".")[0]) for name in found[0]}
    assert trained == set(plan_of(after, plan).layers())
    assert torch.equal(logits(before), logits(after))


def offloaded(model: PreTrainedModel, how: str, folder: Path) -> Any:
    if how == "cpu":
        return accelerate.cpu_offload(model, torch.device("cpu"))
    if how == "disk":
        return accelerate.disk_offload(model, str(folder), torch.device("cpu"))
    stack = find_stack(model)
    places = {name: "cpu" for name, child in model.named_modules() if not list(child.children())}
    inside = tuple(f"{stack.path}.{i}" for i in range(stack.depth))
    places = {name: place for name, place in places.items() if not name.startswith(inside)}
    places |= {name: "disk" if name[-1] in "12" else "cpu" for name in inside}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
@pytest.mark.parametrize("family", ["llama", "bloom", "jamba"])
def test_offloaded_models_run_plans(family: str, how: str, tmp_path: Path) -> None:
    base, model = tiny(family, "eager"), offloaded(own(family, "eager"), how, tmp_path)
    assert inspect(model).stacks == inspect(base).stacks
    plans = ("0-1,3", "1-3", "0,1x2,2-3", "0,1a,2-3", "0m,1-3", "0,2,1,3", "0-2,3@1", "0,~1-2,3")
    single = IDS[:1]
    for plan in plans:
        weights = {"map-1-2.weight": torch.eye(32) * 1.5} if "~" in plan else None
        with running(base, plan, weights), running(model, plan, weights):
            assert torch.equal(logits(model, input_ids=single), logits(base, input_ids=single)), plan


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatch"])
def test_replaced_and_tied_weights_of_an_offloaded_layer_are_those_in_memory(how: str, tmp_path: Path) -> None:
    base, model = tiny("llama", "eager"), offloaded(own("llama", "eager"), how, tmp_path)
    held = base.model.layers[1].state_dict()
    weights = {f"a.{name}": tensor * 1.3 for name, tensor in held.items()}
    weights["u.mlp.up_proj.weight"] = held["mlp.up_proj.weight"] * 0.7
    away = [p.is_meta for p in model.parameters()]
    for plan in ("0,1:a,2-3", "0,1:a,1:a,2-3", "0,1a:a,2-3", "0-1,2=1,3", "0,1=2,2-3", "0-1,2=1:u,3"):
        with running(model, plan, weights), running(base, plan, weights):
            assert torch.equal(logits(model), logits(base)), plan
    assert [p.is_meta for p in model.parameters()] == away
    whole = logits(model)
    assert torch.equal(whole, logits(base))


def test_modules_of_an_offloaded_layer_are_refused(tmp_path: Path) -> None:
    model = offloaded(own("llama"), "dispatch", tmp_path)
    weights = {f"a.{name}": tensor * 1.3 for name, tensor in tiny("llama").model.layers[1].state_dict().items()}
    layers = model.model.layers
    with pytest.raises(PlanError, match=r"P124: layer 1 is offloaded"):
        apply(model, "0,1:a,2-3", weights, modules=True)
    assert model.model.layers is layers and not hasattr(model, "shoal")
