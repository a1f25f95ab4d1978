"""What goes with a KV cache that compresses rows, and what a model is worth behind a prefix in one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from shoal.compressing.cache import make_cache
from shoal.data import Data
from shoal.errors import UsageError
from shoal.evaluation import KVHeld, Perplexity, Progress, perplexity_behind_prefix


def refuse_beside_kv_cache(kv_cache: str | None, **others: Any) -> None:
    """Raise U660 for what is asked for beside a compressing KV cache and does not go with it."""
    asked = next((name for name, value in others.items() if value), None)
    if kv_cache is not None and asked is not None:
        raise UsageError(
            f"the KV cache {kv_cache} goes with a plan alone, not with {asked}; leave one of them out",
            code="U660",
        )


def behind_prefix(
    model: Any,
    text: Data,
    kv_cache: str,
    planned: Callable[[], AbstractContextManager[Any]],
    *,
    batch: int,
    progress: Progress | None,
) -> tuple[Perplexity, KVHeld, Perplexity]:
    """Perplexity behind a compressed prefix with the plan on the model, what was held, and the base model's behind a
    plain cache. Raises what `make_cache` raises before anything runs."""

    def make(mask: torch.Tensor | None, ids: torch.Tensor) -> Any:
        return make_cache(model, kv_cache, mask, ids)

    with planned():
        make(None, text.ids[:1, : text.ids.shape[1] // 2])  # refused before anything runs
        mine, held = perplexity_behind_prefix(model, text, make, batch=batch, progress=progress)
    dense, _ = perplexity_behind_prefix(model, text, batch=batch, progress=progress)
    return mine, held, dense
