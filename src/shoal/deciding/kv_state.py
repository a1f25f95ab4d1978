"""What each entry of the KV cache is: one code for each slot, row and column, kept beside the cache it speaks of."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from shoal.errors import PlanError, UsageError
from shoal.plan.generate_ways import BEAMS_POLICY, says

COMPUTED, PROJECTED, COPIED, HOLE, PENDING = range(5)
"""The layer ran for the token; its K/V were made from the carried state; they are copied from a lower layer; nothing
may read them; the layer will run later."""
VALID = COPIED
"""Codes up to this one may be attended to."""


class KVState:
    """The codes of one cache, [slots, batch, columns] int8 on the CPU, COMPUTED until somebody says otherwise."""

    def __init__(self, owner: object, slots: int, rows: int) -> None:
        self.owner, self.rows, self.length = owner, rows, 0
        self.codes = torch.zeros(slots, rows, 0, dtype=torch.int8)
        self.touched = [False] * slots
        self.waiting: list[Any] = []
        """Blocks of tokens that left early and whose remaining layers run later (the fill "defer")."""
        self.memory: dict[str, Any] = {}
        """What the policy remembers of these sequences."""

    def reach(self, past: int, tokens: int) -> None:
        """Forget what was cropped and make room for a forward of `tokens` columns behind `past`."""
        if past < self.length:
            self.codes[:, :, past:] = COMPUTED
            self.waiting = [block for old in self.waiting if (block := old.cropped(past)) is not None]
        self.length = past + tokens
        short = self.length - self.codes.shape[-1]
        if short > 0 and any(self.touched):
            grown = max(short, self.codes.shape[-1], 64)
            self.codes = torch.cat([self.codes, self.codes.new_zeros(*self.codes.shape[:2], grown)], -1)

    def mark(self, slot: int, past: int, code: int, where: torch.Tensor | None = None) -> None:
        """The columns of this forward, all of them or those `where` bool [batch or 1, tokens], have this code."""
        if not any(self.touched):
            self.codes = self.codes.new_zeros(*self.codes.shape[:2], max(self.length, 64))
        self.touched[slot] = True
        part = self.codes[slot, :, past : self.length]
        if where is None:
            part.fill_(code)
        else:
            part.masked_fill_(where.cpu().expand_as(part), code)

    def unmark(self, slot: int, start: int, end: int) -> None:
        """The columns start..end-1 are computed now."""
        self.codes[slot, :, start:end] = COMPUTED

    def readable(self, slot: int, columns: int) -> torch.Tensor | None:
        """Which of the first `columns` entries may be attended to, bool [batch, columns]; None: all of them."""
        if not self.touched[slot]:
            return None
        seen = self.codes[slot, :, :columns] <= VALID
        return None if bool(seen.all()) else seen


def kv_state_of(cache: Cache | None, owner: object, slots: int, rows: int) -> KVState:
    """The codes that belong to `cache`, made when there are none yet; a pass without a cache gets codes for itself.

    Raises P123 for a cache that another policy or another number of sequences has filled.
    """
    if cache is None:
        return KVState(owner, slots, rows)
    found = cache.__dict__.get("_shoal_kv_state")
    if found is not None and past_of(cache) > 0:
        if found.owner is not owner or found.rows != rows:
            raise PlanError(
                f"this KV cache was filled under another policy or with {found.rows} sequences, not {rows}; "
                "start with an empty cache",
                code="P123",
            )
        return found
    made = cache.__dict__["_shoal_kv_state"] = KVState(owner, slots, rows)
    for name in ("reorder_cache", "batch_select_indices"):
        cache.__dict__[name] = _refuse_reordering
    return made


def _refuse_reordering(*_: Any, **__: Any) -> NoReturn:
    sentence, code = says(BEAMS_POLICY)
    raise UsageError(sentence, code=code)


def past_of(cache: Cache | None) -> int:
    """Columns in `cache`; all rows of a plan hold the same number."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return 0 if cache is None else int(cache.get_seq_length())
