"""Rows of a KV cache as they were before a forward, so that it can be run again."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
"""Rows that never write into a tensor: they make a longer one and keep that."""


def rows_of(cache: Cache) -> list[Any]:
    """The rows of the decoder's own attention."""
    rows: list[Any] = (cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache).layers
    return rows


def copied(row: Any) -> Any:
    """A row that holds the same and may be written to while `row` stays what it is."""
    made = copy.copy(row)
    if type(row) not in _GROWING:
        made.__dict__.update({name: _taken(held) for name, held in _held(row).items()})
    return made


class Rewind:
    """Puts the rows of a cache back to what they are now, any number of times."""

    def __init__(self, cache: Cache) -> None:
        self._rows = rows_of(cache)
        self._before = [(row, dict(row.__dict__) if type(row) in _GROWING else _held(row)) for row in self._rows]

    def __call__(self) -> None:
        """Put them back. A tensor that is still in its place keeps its address, as rows of fixed length need."""
        del self._rows[len(self._before) :]
        for row, before in self._before:
            for name in row.__dict__.keys() - before.keys():
                del row.__dict__[name]
            row.__dict__.update({name: _put_back(row.__dict__.get(name), held) for name, held in before.items()})


@dataclass(frozen=True)
class _Kept:
    """A tensor and what was in it."""

    tensor: torch.Tensor
    content: torch.Tensor


def _held(row: Any) -> dict[str, Any]:
    return {name: _kept(value) for name, value in row.__dict__.items()}


def _kept(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Kept(value, value.clone())
    return {key: _kept(one) for key, one in value.items()} if isinstance(value, dict) else value


def _taken(held: Any) -> Any:
    if isinstance(held, _Kept):
        return held.content
    return {key: _taken(one) for key, one in held.items()} if isinstance(held, dict) else held


def _put_back(now: Any, held: Any) -> Any:
    if isinstance(held, _Kept):
        return now.copy_(held.content) if now is held.tensor else held.content.clone()
    if isinstance(held, dict):
        return {key: _put_back(now.get(key) if isinstance(now, dict) else None, one) for key, one in held.items()}
    return held
