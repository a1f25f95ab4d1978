"""Centred kernel alignment: how alike two sets of states of the same tokens are, whatever rotation lies between them.

H(K, L) is the unbiased Hilbert-Schmidt independence criterion of two kernels [tokens, tokens], summed over sequences;
the alignment is sum H(K, L) / sqrt(sum H(K, K) x sum H(L, L)) (Kornblith et al. 2019, arXiv 1905.00414; Nguyen et al.
2021, arXiv 2010.15327; the estimator of Song et al. 2012).
"""

from __future__ import annotations

from typing import Any

import torch

from shoal.errors import UsageError
from shoal.models.precision import in_float64

LEAST = 4
"""Tokens without which the unbiased estimator does not exist."""


def require_tokens(counts: list[int], skip_first: int) -> None:
    """Raise U536 for a sequence with too few tokens behind the first `skip_first`."""
    if min(counts) < LEAST:
        raise UsageError(
            f"CKA needs {LEAST} tokens in every sequence, and one has {min(counts)} behind the first {skip_first}; "
            "use longer sequences or skip fewer",
            code="U536",
        )


def centred_gram(states: torch.Tensor) -> torch.Tensor:
    """X X^T of [tokens, features] in float64, centred for the unbiased estimator: a zero diagonal, and rows that sum up
    to 0."""
    states = in_float64(states)
    gram = states @ states.T
    count = len(gram)
    gram.fill_diagonal_(0)
    means = gram.sum(1) / (count - 2)
    means -= means.sum() / (2 * (count - 1))
    gram -= means[:, None] + means[None, :]
    return gram.fill_diagonal_(0)


def independence(k: torch.Tensor, m: torch.Tensor) -> float:
    """H = <K, L> / (n (n - 3)) for two centred kernels."""
    return (k * m).sum().item() / (len(k) * (len(k) - 3))


def misalignment(sums: Any) -> Any:
    """1 - CKA from the three sums of H(K, L), H(K, K), H(L, L), [..., 3]; exactly 0 where all three are one number."""
    shared, left, right = sums[..., 0], sums[..., 1], sums[..., 2]
    return 1 - shared / (left * right) ** 0.5


class EveryAlignment:
    """H of every two states, summed over sequences; the states' kernels of one sequence are held at a time."""

    def __init__(self, states: int) -> None:
        self.sums = torch.zeros(states, states, dtype=torch.float64)
        self._held: dict[int, dict[int, torch.Tensor]] = {}

    def add(self, row: int, state: int, gram: torch.Tensor) -> None:
        """The centred kernel of one of the states of sequence `row`."""
        self._held.setdefault(row, {})[state] = gram.flatten()

    def close(self) -> None:
        """The sequences at hand have passed every layer."""
        for held in self._held.values():
            places, tokens = list(held), next(iter(held.values())).numel() ** 0.5
            stacked = torch.stack(list(held.values()))
            self.sums[torch.tensor(places)[:, None], torch.tensor(places)] += (
                stacked @ stacked.T / (tokens * (tokens - 3))
            )
        self._held.clear()

    def matrix(self) -> list[list[float]]:
        """The alignment of every two states; NaN where there was nothing of one of them."""
        self.close()
        lengths = self.sums.diagonal().sqrt()
        aligned: list[list[float]] = (self.sums / torch.outer(lengths, lengths)).tolist()
        return aligned
