"""Calling a model, or the part of it that runs a stack, on text."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shoal.errors import ModelError, UsageError
from shoal.executing.layer_list import LayerProxyList
from shoal.models.calls import device_of
from shoal.models.opened import OpenedModel, open_model
from shoal.models.stacks import Stack


def forward_without_head(model: nn.Module | OpenedModel, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What the head is given, [batch, length, hidden], for `ids` and `mask` [batch, length]; the caller chooses the
    modes and whether gradients are kept. Raises M322 for a model that does not say it."""
    opened = open_model(model)
    state: torch.Tensor | None = getattr(run_stack(opened.model, opened.stack(), ids, mask), "last_hidden_state", None)
    if state is None:
        raise ModelError(
            f"{type(opened.model).__name__} does not hand on the state in front of its head, which is needed here; use "
            "a measure or method that compares the states of layers",
            code="M322",
        )
    return state


def run_stack(model: PreTrainedModel, stack: Stack, ids: torch.Tensor, mask: torch.Tensor | None) -> Any:
    """One uncached pass of the part of the model that runs the stack. Raises M323 for a stack that reads no text."""
    backbone = backbone_of(model, stack)
    more = {"use_cache": False} if stack.name == "decoder" else {}
    return backbone(**inputs_of(backbone, ids, mask), **more)


def backbone_of(model: PreTrainedModel, stack: Stack) -> Any:
    """The part of the model that runs the stack. Without the head, the dearest matrix of a small model, which no layer
    needs; without the decoder or the other stack."""
    if stack.name == "decoder":
        return model.base_model
    around = [m for m in model.modules() if isinstance(m, PreTrainedModel) and stack.owner in m.modules()]
    if "input_ids" not in inspect.signature(around[-1].forward).parameters:
        raise ModelError(
            f"the stack {stack.name!r} of {type(model).__name__} reads no text, and measures have no other data; "
            "remove layers by their position (--method position)",
            code="M323",
        )
    return around[-1]


def require_whole(model: nn.Module | OpenedModel, what: str, stack: str | None = None) -> None:
    """Raise U507 when a plan is running on the stack: `what` needs the base model's own layers, once and in order."""
    if isinstance(open_model(model).stack(stack).layers, LayerProxyList):
        raise UsageError(f"{what} needs the whole model, but a plan is running on it; restore it first", code="U507")


def inputs_of(backbone: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The keyword arguments of a pass over ids and mask [batch, length], on the backbone's device."""
    device = device_of(backbone)
    inputs = {"input_ids": ids.to(device)}
    if "decoder_input_ids" in inspect.signature(backbone.forward).parameters:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if mask is not None:
        inputs["attention_mask"] = mask.to(device)
        if not bool(mask[:, 0].all()) and "position_ids" in inspect.signature(backbone.forward).parameters:
            # most models count positions from the first column, padding or not
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0).to(device)
    return inputs
