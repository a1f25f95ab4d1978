"""A mask of its own for one layer: what the stock forward hides, and the entries of the KV cache that are holes."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache


def seen_columns(cache: Cache | None, slot: int, tokens: int) -> tuple[int, int]:
    """(how many keys attention will see in `slot` after `tokens` more, the column of the first)."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None:
        return tokens, 0
    length, offset = cache.get_mask_sizes(tokens, slot)
    return int(length), int(offset)


def holed(
    mask: torch.Tensor | None,
    readable: torch.Tensor,
    *,
    past: int,
    tokens: int,
    keys: tuple[int, int],
    window: int | None,
    boolean: bool,
    like: torch.Tensor,
) -> torch.Tensor:
    """`mask` [batch or 1, heads or 1, tokens, keys], or the causal one when it is None, with unreadable columns hidden.

    `readable`: bool [batch, past + tokens]. `keys`: (number, first column) of what attention sees. A token always sees
    itself: whoever skips the layer has an answer that nobody uses, and it must not be made of nothing.
    `boolean`: the kind of mask that this attention takes (True: may see; else what is added to the scores).
    """
    number, first = keys
    columns = torch.arange(first, first + number, device=like.device)
    queries = torch.arange(past, past + tokens, device=like.device)[:, None]
    given = torch.zeros(readable.shape[0], number, dtype=torch.bool, device=like.device)
    inside = columns < past + tokens
    given[:, inside] = readable.to(like.device)[:, columns[inside]]
    may = given[:, None, None, :] | (columns == queries)[None, None]
    if mask is None:
        causal = columns <= queries
        if window is not None and tokens > 1:
            causal = causal & (columns > queries - window)
        may = may & causal[None, None]
        return may if boolean else _added(may, like.dtype)
    if mask.dtype == torch.bool:
        return mask & may
    return mask.masked_fill(~may, torch.finfo(mask.dtype).min)


def causal(
    mask: torch.Tensor | None, *, start: int, tokens: int, keys: int, boolean: bool, like: torch.Tensor
) -> torch.Tensor:
    """The mask [batch or 1, 1, tokens, keys] for `tokens` queries in the columns from `start` on, of full attention.

    What is padding is read off `mask`, the stock one of the newest query, which sees all that may be seen.
    """
    columns = torch.arange(keys, device=like.device)
    may = (columns <= torch.arange(start, start + tokens, device=like.device)[:, None])[None, None]
    if mask is not None:
        newest = mask[:, :1, -1:, :]
        may = may & (newest if newest.dtype == torch.bool else newest > torch.finfo(newest.dtype).min / 2)
    return may if boolean else _added(may, like.dtype)


def _added(may: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    nothing = torch.zeros((), dtype=dtype, device=may.device)
    return torch.where(may, nothing, torch.finfo(dtype).min)


def real_columns(mask: Any, past: int, tokens: int) -> torch.Tensor | None:
    """Which of the `tokens` columns behind `past` are no padding, bool [batch, tokens]; None: all, or not to be seen.

    `mask`: what the model is called with, [batch, columns], or, from generate with a static cache, one of four
    dimensions or one for each kind of layer.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 4:
        newest = mask[:, 0, -1]  # sees all that may be seen
        mask = newest if newest.dtype == torch.bool else newest > torch.finfo(newest.dtype).min / 2
        real = mask[:, past : past + tokens]
    else:
        real = mask[:, -tokens:].bool()
    return None if bool(real.all()) else real
