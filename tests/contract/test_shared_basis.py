"""One basis for a group of rows: rank that is there is found, the error is the tail of the singular values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from shoal.compressing.cache import CompressingCache
from shoal.compressing.caches.shared_basis import shared_basis
from shoal.compressing.job import CacheJob
from shoal.evaluation.memory import values_held
from shoal.plan.spec import KVSpec

from .families import tiny

HEADS, TOKENS, DIM = 2, 20, 4


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(states: list[torch.Tensor], real: torch.Tensor | None = None, **options: Any) -> CompressingCache:
    """A cache whose rows were given `states` [batch, heads, tokens, dim] as keys, and twice that as values."""
    kv = KVSpec("full", HEADS, DIM, DIM)
    count = len(states)
    rows = tuple(DynamicCache(config=tiny("llama").config).layers[:count])
    cache = CompressingCache(shared_basis(CacheJob(rows, (0,) * count, (kv,) * count, (0,) * count, real), **options))
    for row, one in enumerate(states):
        cache.update(one, 2 * one, row)
    return cache


def low_rank(rank: int, seed: int = 0) -> list[torch.Tensor]:
    """Three rows of two sequences that share `rank` directions over the tokens."""
    shared = drawn(2, 1, TOKENS, rank, seed=seed)
    return [shared @ drawn(2, HEADS, rank, DIM, seed=seed + 1 + row) for row in range(3)]


def test_a_rank_that_is_there_is_restored_and_held_once() -> None:
    states = low_rank(3)
    cache = filled(states, group=3, rank=3)
    for row, one in zip(cache.layers, states, strict=True):
        torch.testing.assert_close(row.keys, one, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(row.values, 2 * one, atol=1e-4, rtol=1e-4)
    assert values_held(cache) == 2 * 2 * 3 * (TOKENS + 3 * HEADS * DIM)
    assert cache.layers[0].stored is cache.layers[2].stored
    less = filled(states, group=3, rank=2)
    assert float((less.layers[0].keys - states[0]).norm()) > 0.1


def test_the_error_is_the_tail_of_the_singular_values() -> None:
    states = [drawn(1, HEADS, TOKENS, DIM, seed=row) for row in range(3)]
    matrix = torch.cat([one.transpose(1, 2).reshape(TOKENS, -1) for one in states], dim=1)
    tail = torch.linalg.svdvals(matrix.double()).square()
    for rank in (1, 4, 9):
        cache = filled(states, group=3, rank=rank)
        error = sum(float((row.keys - one).square().sum()) for row, one in zip(cache.layers, states, strict=True))
        assert error == pytest.approx(float(tail[rank:].sum()), rel=1e-4)


def test_keys_and_values_have_ranks_of_their_own_and_groups_end_where_they_say() -> None:
    states = low_rank(3)
    cache = filled(states, group=2, rank=1, value_rank=3)
    width = 2 * HEADS * DIM
    pair = 2 * (1 * (TOKENS + width) + 3 * (TOKENS + width))
    alone = 2 * (1 * (TOKENS + HEADS * DIM) + 3 * (TOKENS + HEADS * DIM))
    assert values_held(cache) == pair + alone
    torch.testing.assert_close(cache.layers[1].values, 2 * states[1], atol=1e-4, rtol=1e-4)
    assert cache.layers[1].stored is not cache.layers[2].stored


def test_padding_takes_up_no_rank() -> None:
    states = low_rank(2)
    real = torch.ones(2, TOKENS, dtype=torch.bool)
    real[1, :6] = False
    for row, one in enumerate(states):
        one[1, :, :6] = 100 * drawn(HEADS, 6, DIM, seed=50 + row)
    cache = filled(states, real, group=3, rank=2)
    for row, one in zip(cache.layers, states, strict=True):
        torch.testing.assert_close(row.keys[1, :, 6:], one[1, :, 6:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(row.keys[0], one[0], atol=1e-4, rtol=1e-4)


def test_later_tokens_are_held_as_they_come() -> None:
    states = low_rank(3)
    cache = filled(states, group=3, rank=3)
    before = values_held(cache)
    new = drawn(2, HEADS, 1, DIM, seed=99)
    for row in range(3):
        keys, _ = cache.update(new, new, row)
        assert keys.shape[2] == TOKENS + 1
        assert torch.equal(cache.layers[row].keys[:, :, -1:], new)
    assert values_held(cache) - before == 3 * 2 * new.numel()
