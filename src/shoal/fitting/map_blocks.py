"""Neighbouring layers whose attention maps are alike, by the similarity of every two layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shoal.fitting.sharing import Group

Matrix = Sequence[Sequence[float]]
"""[layers, layers]: how alike the maps of two layers are, 1 for the same."""


def mean_similarity(alike: Matrix, block: Sequence[int]) -> float:
    """The mean over every two layers of `block`."""
    both = [alike[a][b] for at, a in enumerate(block) for b in block[at + 1 :]]
    return math.fsum(both) / len(both)


def grown_blocks(alike: Matrix, layers: Sequence[int], threshold: float) -> tuple[Group, ...]:
    """Blocks of neighbours among `layers`, in order: each takes in the next layer while the mean similarity of its
    layers stays at `threshold` or above. Blocks of one layer are left out."""
    blocks: list[list[int]] = []
    for layer in layers:
        if blocks and mean_similarity(alike, [*blocks[-1], layer]) >= threshold:
            blocks[-1].append(layer)
        else:
            blocks.append([layer])
    return tuple(tuple(block) for block in blocks if len(block) > 1)


def blocks_with(alike: Matrix, layers: Sequence[int], followers: int) -> tuple[tuple[Group, ...], float]:
    """The blocks of the highest threshold at which at least `followers` layers follow another one, and that threshold;
    no block where none does."""
    spans = [layers[a : b + 1] for a in range(len(layers)) for b in range(a + 1, len(layers))]
    for threshold in sorted({mean_similarity(alike, span) for span in spans}, reverse=True):
        found = grown_blocks(alike, layers, threshold)
        if sum(len(block) - 1 for block in found) >= followers:
            return found, threshold
    return (), -math.inf
