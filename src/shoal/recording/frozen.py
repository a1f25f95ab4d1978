"""A prompt whose keys and values above some layer are made from that layer's output, read by tokens behind it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from shoal.errors import UsageError
from shoal.executing.bind import bind
from shoal.executing.calls import cache_of, hidden_of
from shoal.models.opened import open_model
from shoal.plan import Run


def continued(
    model: Any, ids: torch.Tensor, prompt: int, *, frozen: int | None = None, stack: str | None = None
) -> torch.Tensor:
    """Logits [batch, length - prompt, vocab] of `ids` [batch, length] behind the first `prompt` of them, read from
    cache.

    With `frozen` the prompt's keys and values in every layer above that one are made from its output; the tokens behind
    run as always. Raises U537 for a model without a KV cache.
    """
    opened = open_model(model)
    inner: Any = opened.model
    if "past_key_values" not in opened.takes:
        raise _no_cache(inner)
    last = {"logits_to_keep": 1} if "logits_to_keep" in opened.takes else {}
    ids = ids.to(opened.device)
    if frozen is None:
        cache = inner(input_ids=ids[:, :prompt], use_cache=True, **last).past_key_values
    else:
        cache = frozen_cache(opened, ids[:, :prompt], frozen, stack, **last)
    logits: torch.Tensor = inner(input_ids=ids[:, prompt:], past_key_values=cache, use_cache=True).logits
    return logits


def frozen_cache(model: Any, ids: torch.Tensor, frozen: int, stack: str | None = None, **inputs: Any) -> Cache:
    """The cache of a pass over `ids` [batch, length] in which every layer above `frozen` is given that layer's output.
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
            out = executor.run_step(Run(layer), state, record, cache=cache)
            state = out if layer <= frozen else state
    return cache


def _no_cache(model: Any) -> UsageError:
    return UsageError(f"{type(model).__name__} keeps no KV cache to freeze; use a model with attention", code="U537")
