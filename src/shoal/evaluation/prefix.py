"""Perplexity of text behind a prefix that a KV cache holds: what a cache that compresses rows costs in quality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shoal.data import Data
from shoal.errors import UsageError
from shoal.evaluation.memory import values_held
from shoal.evaluation.perplexity import Perplexity, summarise
from shoal.evaluation.scoring import Progress, require_context, require_scored, token_nll, windows
from shoal.executing.inputs import inputs_of
from shoal.models.evaluating import evaluating

MakeCache = Callable[[torch.Tensor | None, torch.Tensor], Any]
"""From mask (None without padding) and ids of a prompt, [batch, tokens] each, to an empty KV cache."""


@dataclass(frozen=True, slots=True)
class KVHeld:
    """What KV caches held behind the prefix of each window, all windows together."""

    values: int
    """Numbers that are held, each once."""
    whole: int
    """Numbers that a plain cache of the same rows holds."""
    prefix: int
    """Tokens of the prefix of one window."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity_behind_prefix(
    model: Any, data: Data, make: MakeCache | None = None, *, batch: int = 1, progress: Progress | None = None
) -> tuple[Perplexity, KVHeld]:
    """Perplexity of the second half of each window, which attends to the first half as a KV cache holds it.

    The first half is one forward, the second is another; its first token is not scored. `make`: makes the cache;
    without it the model makes its own. Raises `UsageError` U510 for windows longer than the model's context, U514 for
    windows of fewer than 4 tokens, `DataError` D420 if no token is scored.
    """
    length = data.ids.shape[1]
    require_context(model, length)
    if length < 4:
        raise UsageError(f"a window of {length} tokens has no second half to score; use 4 or more", code="U514")
    cut, held, whole = length // 2, 0, 0
    found: list[tuple[float, int]] = []
    with evaluating(model):
        for ids, mask, keep in windows(data, batch, progress, "behind the prefix"):
            inputs = inputs_of(model, ids, mask)
            given = (
                {} if make is None else {"past_key_values": make(None if mask is None else mask[:, :cut], ids[:, :cut])}
            )
            first = {name: one[:, :cut] for name, one in inputs.items()}
            cache = model(**first, **given, use_cache=True).past_key_values
            held += values_held(cache)
            whole += sum(_whole(row) for row in cache.layers)
            second = {name: one if name == "attention_mask" else one[:, cut:] for name, one in inputs.items()}
            logits = model(**second, past_key_values=cache, use_cache=True).logits
            scored = keep[:, cut:]
            sums = torch.where(scored, token_nll(logits, ids[:, cut:]), 0.0).sum(-1)
            found += zip(sums.tolist(), scored.sum(-1).tolist(), strict=True)
    require_scored(sum(count for _, count in found), data)
    return summarise(found, data.info), KVHeld(held, whole, cut)


def _whole(row: Any) -> int:
    if not getattr(row, "is_initialized", False):
        return 0
    compressed: int | None = getattr(row, "whole", None)
    return sum(half.numel() for half in (row.keys, row.values)) if compressed is None else compressed
