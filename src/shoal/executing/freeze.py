"""A prompt whose keys and values above some layer are made from that layer's output, read by tokens behind it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.models.opened import open_model
from shoal.models.stacks import unwrap


@contextmanager
def frozen_above(model: nn.Module, layer: int, stack: str | None = None) -> Iterator[None]:
    """Meanwhile every layer above base layer `layer` is given that layer's output instead of the one below's."""
    found = open_model(model).stack(stack)
    state: list[Any] = [None]

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        state[0] = out[0] if isinstance(out, tuple) else out

    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (state[0], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": state[0]}

    handles = [found.layer(layer).register_forward_hook(keep)]
    handles += [
        found.layer(index).register_forward_pre_hook(give, with_kwargs=True) for index in range(layer + 1, found.depth)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def continued(
    model: nn.Module, ids: torch.Tensor, prompt: int, *, frozen: int | None = None, stack: str | None = None
) -> torch.Tensor:
    """Logits [batch, length - prompt, vocab] of `ids` [batch, length] behind the first `prompt` of them, read from
    cache.

    With `frozen` the prompt's keys and values in every layer above that one are made from its output; the tokens behind
    run as always. Raises U537 for a model without a KV cache.
    """
    inner: Any = unwrap(model)
    asked = inspect.signature(inner.forward).parameters
    if "past_key_values" not in asked:
        raise UsageError(f"{type(inner).__name__} keeps no KV cache to freeze; use a model with attention", code="U537")
    device = torch.device("cpu") if inner.device.type == "meta" else inner.device
    last = {"logits_to_keep": 1} if "logits_to_keep" in asked else {}
    ids = ids.to(device)
    if frozen is None:
        cache = inner(input_ids=ids[:, :prompt], use_cache=True, **last).past_key_values
    else:
        with frozen_above(inner, frozen, stack):
            cache = inner(input_ids=ids[:, :prompt], use_cache=True, **last).past_key_values
    logits: torch.Tensor = inner(input_ids=ids[:, prompt:], past_key_values=cache, use_cache=True).logits
    return logits
