"""Small distances keep their digits: float32 against float64, what is equal, what is far, what is impossible."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from shoal.evaluation.agreement import compare_logits
from shoal.evaluation.distances import angle, jensen_shannon, kl_divergence, one_minus_cosine
from shoal.speculating.drafts import clasp, knapsack

EPS = torch.finfo(torch.float32).eps
SIZES = [1.0, 0.1, 1e-2, 1e-3, 1e-4]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(size: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [4, 16, 257] in float32, and others that are about `size` away from them."""
    logits = 3 * drawn(4, 16, 257)
    return logits, logits + size * drawn(4, 16, 257, seed=1) + 0.3 * size


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest relative difference."""
    return float(((found.double() - wanted) / wanted).abs().max())


def naive_kl(dense: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    p, q = (logits.double().log_softmax(-1) for logits in (dense, pruned))
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("size", SIZES)
def test_a_small_kl_keeps_its_digits(size: float) -> None:
    """A step of float32 in a difference d of logits is eps / d of it; sums of 257 terms stay within a hundred steps."""
    dense, pruned = moved(size)
    found, same = compare_logits(dense, pruned)
    assert found.dtype == torch.float64
    assert worst(found, naive_kl(dense, pruned)) < 100 * EPS + 20 * EPS / size
    assert torch.equal(same, dense.argmax(-1) == pruned.argmax(-1))
    assert torch.equal(compare_logits(dense, dense)[0], torch.zeros(4, 16, dtype=torch.float64))


def test_a_kl_of_float64_logits_is_in_float64() -> None:
    dense, pruned = (logits.double() for logits in moved(1e-2))
    assert worst(compare_logits(dense, pruned)[0], naive_kl(dense, pruned)) < 1e-8  # the naive sum's own digits


def test_a_kl_of_tokens_that_one_side_hardly_knows_does_not_overflow() -> None:
    far = torch.tensor([[0.0, 0.0, -300.0], [0.0, -200.0, 0.0]])
    near = torch.tensor([[0.0, 0.0, 200.0], [0.0, 0.0, 0.0]])
    for p, q in ((far, near), (near, far)):
        assert worst(kl_divergence(p, q), naive_kl(p, q)) < 100 * EPS
    never = -torch.inf
    ruled_out = kl_divergence(torch.tensor([1.0, 2.0, never, never]), torch.tensor([1.0, 2.0, 3.0, never]))
    assert ruled_out.item() == pytest.approx(math.log1p(math.e**2 / (1 + math.e)), rel=100 * EPS)
    assert kl_divergence(torch.tensor([1.0, 2.0]), torch.tensor([1.0, never])).item() == math.inf
    assert math.isnan(kl_divergence(torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan])).item())


@pytest.mark.parametrize("size", SIZES)
def test_a_small_jensen_shannon_divergence_keeps_its_digits(size: float) -> None:
    p, r = (logits.softmax(-1) for logits in moved(size))
    middle = (p.double() + r) / 2
    wanted = sum((q * (q.double() / middle).log()).sum(-1) for q in (p, r)) / 2
    assert worst(jensen_shannon(p, r), wanted) < 100 * EPS
    assert torch.equal(jensen_shannon(p, p), torch.zeros(4, 16))


def test_jensen_shannon_of_distributions_that_share_nothing_is_the_log_of_two() -> None:
    one, other = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert jensen_shannon(one, other).item() == pytest.approx(math.log(2), rel=10 * EPS)


@pytest.mark.parametrize("size", SIZES)
def test_small_angles_keep_their_digits(size: float) -> None:
    """Unit vectors are rounded to eps in length, their difference to eps / size of it."""
    x = drawn(50, 64)
    y = x + size * drawn(50, 64, seed=1)
    cosine = torch.cosine_similarity(x.double(), y.double(), dim=-1)
    exact = torch.atan2((x.double().square().sum(-1) * y.double().square().sum(-1) * (1 - cosine**2)).sqrt(),
                        (x.double() * y.double()).sum(-1))  # fmt: skip
    assert worst(angle(x, y), exact) < 20 * EPS / size + 20 * EPS
    assert worst(one_minus_cosine(x, y), 2 * (exact / 2).sin() ** 2) < 20 * EPS / size + 20 * EPS
    assert torch.equal(angle(x, x), torch.zeros(50)) and torch.equal(one_minus_cosine(x, x), torch.zeros(50))
    assert angle(x, -x) == pytest.approx(torch.full((50,), math.pi), rel=10 * EPS)
    assert one_minus_cosine(x.double(), y.double()).dtype == torch.float64
    assert one_minus_cosine(x.bfloat16(), y.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("near", [clasp.similarity, knapsack.similarity])
def test_a_draft_tells_near_states_of_bfloat16_apart(near: Callable[[torch.Tensor, torch.Tensor], float]) -> None:
    """A cosine in bfloat16 has steps of 0.004 below 1, and would call both equally near."""
    true = drawn(1, 1, 576)
    nearer, farther = ((true + size * drawn(1, 1, 576, seed=1)).bfloat16() for size in (0.03, 0.05))
    assert near(nearer, true.bfloat16()) > near(farther, true.bfloat16()) > 0.996
