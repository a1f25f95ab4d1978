"""MiniCache by hand: what a pair of rows is restored to, which tokens stay unmerged, and what is held."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from shoal.compressing.cache import CompressingCache, make_cache
from shoal.compressing.caches.minicache import minicache
from shoal.compressing.job import CacheJob
from shoal.evaluation.memory import tensors_of, values_held
from shoal.plan.spec import KVSpec

from .families import tiny

HEADS, TOKENS, DIM = 2, 20, 4


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(
    lower: torch.Tensor, upper: torch.Tensor, real: torch.Tensor | None = None, **options: Any
) -> CompressingCache:
    """A cache of two rows that was given `lower` and `upper` [batch, heads, tokens, dim], as keys and as values."""
    kv = KVSpec("full", lower.shape[1], lower.shape[3], lower.shape[3])
    rows = tuple(DynamicCache(config=tiny("llama").config).layers[:2])
    cache = CompressingCache(minicache(CacheJob(rows, (0, 1), (kv, kv), (0, 1), real), start=0, **options))
    for row, states in enumerate((lower, upper)):
        keys, values = cache.update(states, states, row)
        assert torch.equal(keys, states) and torch.equal(values, states), "the prefill sees what it brought"
    return cache


def restored(cache: CompressingCache) -> tuple[torch.Tensor, torch.Tensor]:
    assert all(torch.equal(row.keys, row.values) for row in cache.layers)
    return cache.layers[0].keys, cache.layers[1].keys


def by_hand(x: list[float], y: list[float], t: float) -> tuple[list[float], list[float]]:
    """The formula for one vector of each row, in Python's float64."""
    a, b = math.hypot(*x), math.hypot(*y)
    omega = math.acos(sum(p * q for p, q in zip(x, y, strict=True)) / (a * b))
    e = [
        math.sin((1 - t) * omega) / math.sin(omega) * p / a + math.sin(t * omega) / math.sin(omega) * q / b
        for p, q in zip(x, y, strict=True)
    ]
    return [a * one for one in e], [b * one for one in e]


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 1.0])
def test_a_merged_pair_is_the_formula(t: float) -> None:
    """The plain mean of the two rows, and one length for both, are other numbers."""
    lower, upper = drawn(1, HEADS, TOKENS, DIM), 3 * drawn(1, HEADS, TOKENS, DIM, seed=1)
    found = restored(pair(lower, upper, keep=0.0, t=t))
    for head in range(HEADS):
        for token in range(TOKENS):
            hand = by_hand(lower[0, head, token].tolist(), upper[0, head, token].tolist(), t)
            for one, other in zip(found, hand, strict=True):
                torch.testing.assert_close(one[0, head, token], torch.tensor(other), atol=2e-5, rtol=2e-5)
    for one, other in zip(found, (lower, upper), strict=True):
        torch.testing.assert_close(one.norm(dim=-1), other.norm(dim=-1), atol=1e-6, rtol=1e-6)


def test_a_right_angle_is_cut_where_t_says_and_not_in_the_middle() -> None:
    lower = torch.tensor([1.0, 0, 0, 0]).expand(1, 1, 1, 4)
    upper = torch.tensor([0.0, 5, 0, 0]).expand(1, 1, 1, 4)
    first, second = restored(pair(lower, upper, keep=0.0, t=0.6))
    turned = math.radians(0.6 * 90)
    torch.testing.assert_close(first[0, 0, 0], torch.tensor([math.cos(turned), math.sin(turned), 0, 0]))
    torch.testing.assert_close(second[0, 0, 0], 5 * first[0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_and_multiples_are_restored(dtype: torch.dtype) -> None:
    lower = drawn(2, HEADS, TOKENS, DIM).to(dtype)
    for upper in (lower, 7 * lower):
        for one, other in zip(restored(pair(lower, upper, keep=0.0)), (lower, upper), strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_opposite_and_empty_vectors_are_numbers() -> None:
    lower = drawn(1, HEADS, TOKENS, DIM)
    for upper in (-lower, torch.zeros_like(lower)):
        first, second = restored(pair(lower, upper, keep=0.0))
        torch.testing.assert_close(second.norm(dim=-1), upper.norm(dim=-1), atol=1e-6, rtol=1e-6)
        assert torch.isfinite(first).all()


def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that are nearly one, but for the tokens 3 and 11, and the angle of each token, mean over the heads."""
    lower = drawn(1, HEADS, TOKENS, DIM)
    upper = lower + 0.05 * drawn(1, HEADS, TOKENS, DIM, seed=1)
    upper[:, :, 3], upper[:, :, 11] = drawn(1, HEADS, DIM, seed=2), -lower[:, :, 11] + 0.5
    cosine = torch.cosine_similarity(lower.double(), upper.double(), dim=-1)
    return lower, upper, torch.arccos(cosine).mean(1)[0]


def exact(cache: CompressingCache, lower: torch.Tensor, upper: torch.Tensor) -> set[int]:
    """The tokens that both rows restore bit for bit."""
    same = [(one == other).all(-1).all(1)[0] for one, other in zip(restored(cache), (lower, upper), strict=True)]
    return set(torch.nonzero(same[0] & same[1])[:, 0].tolist())


def test_the_tokens_that_differ_most_stay_unmerged() -> None:
    lower, upper, angles = planted()
    assert exact(pair(lower, upper, keep=0.1), lower, upper) == {3, 11}
    assert set(angles.topk(2).indices.tolist()) == {3, 11}
    nearest = exact(pair(lower, upper, keep=0.1, rule="similar"), lower, upper)
    assert nearest == set((-angles).topk(2).indices.tolist()), "the inverted rule of released code"
    assert exact(pair(lower, upper, keep=0.0), lower, upper) == set()
    assert exact(pair(lower, upper, keep=1.0), lower, upper) == set(range(TOKENS))


@pytest.mark.parametrize("gamma", [0.05, 0.3, 0.6])
def test_the_threshold_of_the_paper(gamma: float) -> None:
    lower, upper, angles = planted()
    least, most = angles.min(), angles.max()
    far = set(torch.nonzero(angles > most - gamma * (most - least))[:, 0].tolist())
    near = set(torch.nonzero(angles < least + gamma * (most - least))[:, 0].tolist())
    assert far and near and far != near
    assert exact(pair(lower, upper, gamma=gamma), lower, upper) == far
    assert exact(pair(lower, upper, gamma=gamma, rule="similar"), lower, upper) == near


def test_the_error_falls_with_the_share_that_is_kept() -> None:
    lower, upper = drawn(1, HEADS, TOKENS, DIM), drawn(1, HEADS, TOKENS, DIM, seed=1)
    errors = []
    for keep in (0, 0.2, 0.5, 0.8, 1):
        found = restored(pair(lower, upper, keep=keep))
        errors.append(sum(float((a - b).square().sum()) for a, b in zip(found, (lower, upper), strict=True)))
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0 < errors[-2]


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 1.0])
def test_what_is_held_is_counted_and_shared(keep: float) -> None:
    lower, upper = drawn(2, HEADS, TOKENS, DIM), drawn(2, HEADS, TOKENS, DIM, seed=1)
    cache = pair(lower, upper, keep=keep)
    kept = round(keep * TOKENS)
    half = 2 * HEADS * (TOKENS * DIM + 2 * TOKENS + 2 * kept * DIM)  # directions, both lengths, both rows' kept
    assert values_held(cache) == 2 * half
    stores = [row.stored["keys"]["direction"].untyped_storage().data_ptr() for row in cache.layers]
    assert stores[0] == stores[1], "one tensor for both rows"
    held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors_of(cache)}
    index = 2 * 2 * kept * 8
    assert sum(held.values()) == 4 * values_held(cache) + index, "nothing else keeps the rows alive"


@pytest.mark.parametrize("later", ["merge", "keep"])
def test_later_tokens_are_merged_or_kept(later: str) -> None:
    lower, upper = drawn(1, HEADS, TOKENS, DIM), drawn(1, HEADS, TOKENS, DIM, seed=1)
    cache = pair(lower[:, :, :12], upper[:, :, :12], keep=0.25, later=later)
    before = values_held(cache)
    for token in range(12, TOKENS):
        for row, states in enumerate((lower, upper)):
            new = states[:, :, token : token + 1]
            keys, _ = cache.update(new, new, row)
            assert keys.shape[2] == token + 1 and torch.equal(keys[:, :, -1:], new)
    grown = (values_held(cache) - before) // (TOKENS - 12)
    assert grown == 2 * HEADS * (DIM + 2 if later == "merge" else 2 * DIM)
    late = {token for token in exact(cache, lower, upper) if token >= 12}
    assert late == (set() if later == "merge" else set(range(12, TOKENS)))
    if later == "merge":  # each as if it had been merged alone
        alone = restored(pair(lower[:, :, 15:16], upper[:, :, 15:16], keep=0.0))
        for one, other in zip(restored(cache), alone, strict=True):
            torch.testing.assert_close(one[:, :, 15:16], other)


def test_padding_is_never_kept_and_does_not_count() -> None:
    lower, upper, _ = planted()
    padding = drawn(1, HEADS, 5, DIM, seed=9)
    real = torch.ones(2, TOKENS, dtype=torch.bool)
    real[1, :5] = False
    batch = [
        torch.cat([one, torch.cat([padding * (1 if i else -1), one[:, :, 5:]], 2)])
        for i, one in enumerate((lower, upper))
    ]
    for rule in ({"keep": 0.2}, {"gamma": 0.3}, {"keep": 0.2, "rule": "similar"}):
        together = restored(pair(*batch, real=real, **rule))
        alone = restored(pair(lower[:, :, 5:], upper[:, :, 5:], **rule))
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[1:, :, 5:], other, atol=1e-6, rtol=1e-6)
        whole = restored(pair(lower, upper, **rule))
        for one, other in zip(together, whole, strict=True):
            torch.testing.assert_close(one[:1], other, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_the_pairs_begin_where_start_says_and_a_last_row_stays_alone() -> None:
    model = tiny("llama")
    ids = torch.arange(3, 15)[None]
    for text, pairs in (
        ("minicache", [(2, 3)]),
        ("minicache:start=1", [(1, 2)]),
        ("minicache:start=0", [(0, 1), (2, 3)]),
    ):
        cache = make_cache(model, text)
        model(ids, past_key_values=cache)
        shared = [
            (i, j)
            for i in range(4)
            for j in range(i + 1, 4)
            if getattr(cache.layers[i], "stored", 0) is getattr(cache.layers[j], "stored", 1)
        ]
        assert shared == pairs


def test_half_precision_is_kept() -> None:
    lower, upper = drawn(1, HEADS, TOKENS, DIM).bfloat16(), drawn(1, HEADS, TOKENS, DIM, seed=1).bfloat16()
    cache = pair(lower, upper, keep=0.1)
    assert {one.dtype for one in tensors_of(cache)} == {torch.bfloat16, torch.int64}
    first, _ = restored(cache)
    assert first.dtype == torch.bfloat16
    torch.testing.assert_close(first.float().norm(dim=-1), lower.float().norm(dim=-1), atol=0.05, rtol=0.03)
