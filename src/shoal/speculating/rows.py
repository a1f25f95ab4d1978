"""KV caches that share rows: a draft writes into rows of its own, and reads those that the base model wrote.

A row of a dynamic cache is never written in place: `update` puts a new tensor in its stead. So a shallow copy of a row
costs nothing, does not change the original, and is dropped when the draft has been verified.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicCache

from shoal.errors import UsageError
from shoal.executing.slots import mark_rows


def select_rows(cache: Cache, rows: Sequence[int], shared: int) -> Cache:
    """A cache of the rows `rows` of `cache`, in that order: the first `shared` are the very rows, the others copies."""
    out = copy.copy(cache)
    out.layers = [cache.layers[row] if n < shared else copy.copy(cache.layers[row]) for n, row in enumerate(rows)]
    mark_rows(out, tuple(rows))
    return out


def keep_places(cache: Cache, new: int, places: Sequence[int]) -> None:
    """Of the last `new` tokens keep those at `places`, which ascend, in every row; sliding rows are brought back to
    their window, for which the places must be the first ones."""
    in_line = list(places) == list(range(len(places)))
    for row in cache.layers:
        if row.is_initialized and row.keys is not None:
            if not in_line:
                row.keys, row.values = (_moved_up(held, new, places) for held in (row.keys, row.values))
            row.crop(len(places) - new)


def _moved_up(held: torch.Tensor, new: int, places: Sequence[int]) -> torch.Tensor:
    """`held`, [..., tokens, dim], with those of its last `new` tokens that stand at `places` in front of the others."""
    start = held.shape[-2] - new
    kept = held[..., [start + place for place in places], :]
    return torch.cat([held[..., :start, :], kept, held[..., start + len(places) :, :]], -2)


def keep_past(cache: Cache) -> list[object]:
    """Sliding rows keep what has left the window until `keep_places`; returns those that did not before."""
    changed: list[object] = [row for row in cache.layers if getattr(row, "record_past", True) is False]
    cache.activate_past_recording()
    return changed


def forget_past(rows: list[object]) -> None:
    """Undo `keep_past`."""
    for row in rows:
        row.record_past = False  # type: ignore[attr-defined]


def require_dynamic(cache: object) -> None:
    """Raise U612 unless `cache` is one that grows by concatenation and lies on one device."""
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise UsageError(
            f"speculation takes rejected tokens back from the KV cache, and {type(cache).__name__} "
            f"{'offloads its rows' if isinstance(cache, DynamicCache) else 'cannot give them back'}; "
            "leave out cache_implementation and use_cache=False",
            code="U612",
        )


def require_croppable(cache: Cache) -> None:
    """Raise U613 when a filled row cannot give tokens back (recurrent states)."""
    for number, row in enumerate(cache.layers):
        if not row.is_croppable:
            raise UsageError(
                f"row {number} of the KV cache ({type(row).__name__}) keeps a recurrent state, from which rejected "
                "tokens cannot be taken back; generate without speculation",
                code="U613",
            )
