"""Layers compared two by two while data passes: each with the one below, or every two of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Of = TypeVar("Of")
"""What is kept of a layer while a batch passes."""


class LayerPairs(Generic[Of]):
    """A distance between layers, summed over the tokens of each sequence, in the order in which the layers run; what is
    kept of a layer lives no longer than its batch."""

    def __init__(self, depth: int, *, every: bool) -> None:
        """`every`: every two layers are compared, so that what is kept of all of them is held at a time."""
        self.every = every
        self.counts: list[int] = []
        """By sequence: the tokens that are compared."""
        self._sums: list[list[float]] = [[] for _ in range(depth)]
        self._matrix = torch.zeros(depth, depth, dtype=torch.float64)
        self._known = torch.eye(depth, dtype=torch.bool)
        self._held: dict[int, Of] = {}
        self._batch = 0

    def begin(self, counts: list[int]) -> None:
        """A new batch, whose sequences have so many tokens that are compared."""
        self._held.clear()
        self._batch = len(counts)
        self.counts += counts

    def add(self, layer: int, own: Of, apart: Callable[[Of, Of], torch.Tensor | None]) -> None:
        """What there is of a layer. `apart`: how far two are apart, summed over tokens, [sequences] in float64 on the
        CPU; None for two that cannot be compared."""
        below = max(self._held, default=None)
        for other, theirs in self._held.items():
            found = apart(own, theirs)
            if found is not None:
                self._matrix[layer, other] += found.sum()
                self._known[layer, other] = True
            if other == below:
                self._sums[layer] += [math.nan] * self._batch if found is None else found.tolist()
        if not self.every:
            self._held.clear()
        self._held[layer] = own

    def sums(self) -> list[list[float]]:
        """By layer and sequence: how far it is from the nearest layer below of which there is something; NaN for a
        layer that was compared with none."""
        return [own or [math.nan] * len(self.counts) for own in self._sums]

    def matrix(self) -> list[list[float]]:
        """The mean over tokens for every two layers, [depth][depth]; NaN for two that were not compared."""
        both, known = self._matrix + self._matrix.T, self._known | self._known.T
        mean: list[list[float]] = torch.where(known, both / max(1, sum(self.counts)), math.nan).tolist()
        return mean


def kept_tokens(ids: torch.Tensor, mask: torch.Tensor | None, *, skip_first: int) -> torch.Tensor:
    """Which tokens are compared, bool [batch, length]: real ones behind the first `skip_first` of each sequence."""
    keep = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
    return keep & (keep.cumsum(-1) > skip_first)
