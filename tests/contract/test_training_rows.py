"""Loss and gradients of every kind of step: those of the rewritten stock model, and the same under gradient
checkpointing of either kind, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from shoal.live import running
from shoal.models.stacks import find_stack
from shoal.writing.surgery import rewrite

from .kinds import kind as tiny_kind
from .live_models import IDS, own, plan_of
from .policy_cells import KINDS, batch_of, policy_for
from .shares import pairs

ATTENTIONS = ["sdpa", "eager"]
MODES = {"plain": None, "checkpointed": False, "reentrant": True}
OTHER_ORDER = 2e-6
"""Where gradients of one state are added up in another order; 2e-7 was seen."""
Found = tuple[torch.Tensor, dict[str, torch.Tensor]]


def learning(model: PreTrainedModel) -> PreTrainedModel:
    """In training mode and without dropout, so that two passes can be compared."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "dropout_rate"):
            if isinstance(module.__dict__.get(name), float):
                module.__dict__[name] = 0.0
    return model.train()


def checkpointing(model: PreTrainedModel, reentrant: bool | None) -> None:
    if reentrant is not None:
        # the older name is the one that transformers 5.20 knows
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": reentrant})


def passed(model: PreTrainedModel, others: dict[str, torch.Tensor] | None = None, **batch: torch.Tensor) -> Found:
    """The loss, and the gradients of the model's parameters and of `others`."""
    named = {**dict(model.named_parameters()), **(others or {})}
    for tensor in named.values():
        tensor.grad = None
    batch = batch or {"input_ids": IDS}
    out = model(**batch, labels=batch.get("decoder_input_ids", batch["input_ids"]))
    out.loss.backward()
    return out.loss.detach(), {name: t.grad.clone() for name, t in named.items() if t.grad is not None}


def same(one: Found, other: Found, atol: float = 0.0) -> None:
    torch.testing.assert_close(one[0], other[0], atol=atol, rtol=0)
    assert one[1].keys() == other[1].keys() and one[1]
    for name, gradient in one[1].items():
        torch.testing.assert_close(
            other[1][name], gradient, atol=atol, rtol=0, msg=lambda said, of=name: f"{of}: {said}"
        )


STOCK = {
    "identity": "0-3", "drop": "0-1,3", "reorder": "0,2,1,3", "repeat": "0,1x2,2-3", "parts": "0,1m,2a,3",
    "replaced": "0,1:x,2-3",
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("row", "attention"), pairs(2, STOCK, ATTENTIONS))
def test_a_live_plan_learns_as_the_rewritten_model_does(row: str, attention: str, mode: str) -> None:
    model = learning(own("llama", attention))
    up = find_stack(model).layer(1).mlp.up_proj.weight
    tensors = {"x.mlp.up_proj.weight": nn.Parameter(up.detach() * 0.5)} if row == "replaced" else {}
    plan = plan_of(model, STOCK[row])
    made = learning(rewrite(copy.deepcopy(model), plan, weights=tensors, zero_parts=True))
    for one in (model, made):
        checkpointing(one, MODES[mode])
    with running(model, plan, tensors):
        loss, live = passed(model, tensors)
    stock_loss, stock = passed(made)
    assert torch.equal(loss, stock_loss)
    summed: dict[str, torch.Tensor] = {}
    for name in reversed(list(stock)):  # the backward pass comes to the later of two slots first
        head, _, rest = name.partition("model.layers.")
        slot, _, inner = rest.partition(".")
        layer = plan.layers()[int(slot)] if rest else -1
        own_name = "x.mlp.up_proj.weight" if row == "replaced" and (layer, inner) == (1, "mlp.up_proj.weight") else name
        base = f"{head}model.layers.{layer}.{inner}" if rest and own_name == name else own_name
        summed[base] = summed[base] + stock[name] if base in summed else stock[name]
    assert live.keys() <= summed.keys()
    for name, gradient in live.items():
        assert torch.equal(gradient, summed[name]), name
    without = summed.keys() - live.keys()
    assert all(row == "parts" and name.split(".")[2] in "12" for name in without), "the zeros of a missing part"


ROWS = STOCK | {
    "map": "0,~1-2,3", "group": "0,(1|2),3", "shared KV": "0-1,2@1,3@1", "shared KV across a drop": "0,2-3@0",
    "KV of a part": "0-1,2a@1,3",
}  # fmt: skip


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointed", "reentrant"])
@pytest.mark.parametrize(("row", "attention"), pairs(2, ROWS, ATTENTIONS))
def test_checkpointing_changes_no_bit(row: str, attention: str, reentrant: bool) -> None:
    model = learning(own("llama", attention))
    up = find_stack(model).layer(1).mlp.up_proj.weight
    tensors = {
        "x.mlp.up_proj.weight": nn.Parameter(up.detach() * 0.5),
        "map-1-2.weight": nn.Parameter(torch.eye(32) * 1.1),
    }
    with running(model, ROWS[row], tensors):
        plain = passed(model, tensors)
        checkpointing(model, reentrant)
        same(plain, passed(model, tensors), atol=OTHER_ORDER if row == "group" and reentrant else 0.0)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "opt", "jamba"])
@pytest.mark.parametrize("plan", ["0,1a,2-3", "0-2,3@1"])
def test_it_does_not_in_other_families(family: str, plan: str) -> None:
    model = learning(own(family))
    if family == "jamba":  # its layers are of several kinds
        plan = "0,1a,2-3"
    for reentrant in (False, True):
        fresh = copy.deepcopy(model)
        with running(fresh, plan):
            plain = passed(fresh)
            checkpointing(fresh, reentrant)
            same(plain, passed(fresh))


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointed", "reentrant"])
@pytest.mark.parametrize(("kind", "attention"), pairs(2, KINDS, ATTENTIONS))
def test_what_a_policy_decides_is_learned_through_alike(kind: str, attention: str, reentrant: bool) -> None:
    """Fills and halves of layers, where tokens of one pass decide differently."""
    model, policy = learning(own("llama", attention)), policy_for("llama", attention, kind)
    with running(model, policy.plan, policy=policy):
        plain = passed(model, **batch_of(2))
        checkpointing(model, reentrant)
        same(plain, passed(model, **batch_of(2)), atol=OTHER_ORDER if reentrant else 0.0)


def test_a_copied_entry_is_no_projected_one() -> None:
    """What was computed under checkpointing before: the loss of the fill project."""
    losses = {}
    for fill in ("copy", "project"):
        model, policy = learning(own("llama")), policy_for("llama", "sdpa", "skip/copy")
        plan = plan_of(model, str(policy.plan).replace("/copy", f"/{fill}"))
        own_policy: Any = type(policy)(plan, policy.tables)  # type: ignore[attr-defined, call-arg]
        checkpointing(model, False)
        with running(model, plan, policy=own_policy):
            losses[fill] = passed(model, **batch_of(2))[0]
    assert abs(losses["copy"] - losses["project"]) > 1e-4


@pytest.mark.parametrize("plan", ["encoder: 1-5", "decoder: 2-5", "encoder: 2,0-1; decoder: 1:x,0,3"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointed", "reentrant"])
def test_what_the_first_layer_makes_for_all_is_learned_too(plan: str, reentrant: bool) -> None:
    """T5's position bias, which another layer makes where layer 0 does not come first."""
    model = learning(copy.deepcopy(tiny_kind("t5")))
    held = find_stack(model, "decoder").layer(1).state_dict()
    tensors = {f"x.{name}": nn.Parameter(t * 0.9) for name, t in held.items()}
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    with running(model, plan, tensors):
        plain = passed(model, tensors, **batch)
        checkpointing(model, reentrant)
        same(plain, passed(model, tensors, **batch), atol=OTHER_ORDER)
    assert any("relative_attention_bias" in name for name in plain[1])
