"""A prompt whose layers are given other states than those that were made for them, read by tokens behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache

from shoal.errors import UsageError
from shoal.executing.bind import bind
from shoal.executing.calls import cache_of, hidden_of
from shoal.models.opened import open_model
from shoal.plan import Run

GoesOn = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""A layer, the state of the prompt that it was given and the one that it made -> the state that the next is given,
[batch, length, hidden] each."""


def frozen_at(frozen: int) -> GoesOn:
    """Every layer above `frozen` is given its output."""
    return lambda layer, given, made: made if layer <= frozen else given


def continued(
    model: Any,
    ids: torch.Tensor,
    prompt: int,
    *,
    frozen: int | None = None,
    goes_on: GoesOn | None = None,
    stack: str | None = None,
) -> torch.Tensor:
    """Logits [batch, length - prompt, vocab] of `ids` [batch, length] behind the first `prompt` of them, read from
    cache.

    With `frozen` the prompt's keys and values in every layer above that one are made from its output, with `goes_on`
    from what that says; the tokens behind run as always. Raises U537 for a model without a KV cache.
    """
    opened = open_model(model)
    inner: Any = opened.model
    if "past_key_values" not in opened.takes:
        raise _no_cache(inner)
    last = {"logits_to_keep": 1} if "logits_to_keep" in opened.takes else {}
    ids, goes_on = ids.to(opened.device), frozen_at(frozen) if frozen is not None else goes_on
    if goes_on is None:
        cache = inner(input_ids=ids[:, :prompt], use_cache=True, **last).past_key_values
    else:
        cache = prompt_cache(opened, ids[:, :prompt], goes_on, stack, **last)
    logits: torch.Tensor = inner(input_ids=ids[:, prompt:], past_key_values=cache, use_cache=True).logits
    return logits


def frozen_cache(model: Any, ids: torch.Tensor, frozen: int, stack: str | None = None, **inputs: Any) -> Cache:
    """The cache of a pass over `ids` [batch, length] in which every layer above `frozen` is given that layer's output.
    Raises U537 for a model without a KV cache."""
    return prompt_cache(model, ids, frozen_at(frozen), stack, **inputs)


def prompt_cache(model: Any, ids: torch.Tensor, goes_on: GoesOn, stack: str | None = None, **inputs: Any) -> Cache:
    """The cache of a pass over `ids` [batch, length] in which each layer is given what `goes_on` says of the one below.
    Raises U537 for a model without a KV cache."""
    opened = open_model(model)
    inner: Any = opened.model
    bound = bind(opened)
    executor = bound.executor(stack)
    with bound.running():
        record = executor.prepared(lambda: inner(input_ids=ids, use_cache=True, **inputs))
        cache, state = cache_of(record.calls[0]), hidden_of(record.calls[0])
        if cache is None:
            raise _no_cache(inner)
        for layer in range(executor.depth):
            state = goes_on(layer, state, executor.run_step(Run(layer), state, record, cache=cache))
    return cache


def _no_cache(model: Any) -> UsageError:
    return UsageError(f"{type(model).__name__} keeps no KV cache to freeze; use a model with attention", code="U537")
