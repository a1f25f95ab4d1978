"""How far two orders of the same layers agree, and whether there were enough sequences to trust one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shoal.errors import UsageError
from shoal.scores import Scores


@dataclass(frozen=True, slots=True)
class RankAgreement:
    """Of the layers that both judged; 1 is the same order, 0 none, -1 the reverse."""

    kendall: float
    """Tau-b: pairs in the same order less pairs in the other, over all, ties allowed for; NaN for a constant side."""
    spearman: float
    """The correlation of the ranks; NaN for a constant side."""
    overlap: int
    """Layers that are among the k lowest of both."""
    k: int
    layers: int
    """Layers that both judged."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SubsampleAgreement:
    """How alike the k lowest layers of two disjoint draws of so many sequences are."""

    k: int
    sizes: tuple[int, ...]
    overlap: tuple[float, ...]
    """By size: the share of the k lowest that both draws name, mean over draws."""
    share: float
    """The overlap that was asked for."""
    sequences: int | None
    """The least size from which on the overlap is at least `share`; None when half of the sequences do not reach it."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rank_agreement(one: Scores, other: Scores, *, k: int = 8) -> RankAgreement:
    """Kendall's tau-b, Spearman's rho and the overlap of the `k` lowest between two scores of the same stack.

    Layers that one of the two could not judge are left out of both. Raises U539 for scores of other layers or spans,
    and for fewer than two common layers.
    """
    from scipy import stats

    if (one.stack, one.span, len(one.values)) != (other.stack, other.span, len(other.values)):
        raise UsageError(
            f"{one.measure} judges {len(one.values)} spans of {one.span} of {one.stack!r} and {other.measure} "
            f"{len(other.values)} of {other.span} of {other.stack!r}; compare scores of the same layers",
            code="U539",
        )
    pairs = [
        (i, a, b)
        for i, (a, b) in enumerate(zip(one.values, other.values, strict=True))
        if not math.isnan(a) and not math.isnan(b)
    ]
    if len(pairs) < 2 or k < 1:
        raise UsageError(
            f"{one.measure} and {other.measure} have {len(pairs)} layers in common and k is {k}; an order needs 2 or "
            "more layers, and k 1 or more",
            code="U539",
        )
    indices, left, right = zip(*pairs, strict=True)
    most = min(k, len(pairs))
    constant = len(set(left)) == 1 or len(set(right)) == 1
    return RankAgreement(
        kendall=math.nan if constant else float(stats.kendalltau(left, right).statistic),
        spearman=math.nan if constant else float(stats.spearmanr(left, right).statistic),
        overlap=len(_lowest(left, indices, most) & _lowest(right, indices, most)),
        k=most,
        layers=len(pairs),
    )


def agreement_table(
    scores: Mapping[str, Scores] | Sequence[Scores], *, k: int = 8
) -> dict[tuple[str, str], RankAgreement]:
    """`rank_agreement` of every two scores that judge the same layers, by their names (the measures' for a sequence);
    two that judge other spans, or have fewer than two layers in common, are left out."""
    named = dict(scores) if isinstance(scores, Mapping) else {own.measure: own for own in scores}
    names = list(named)
    table: dict[tuple[str, str], RankAgreement] = {}
    for place, a in enumerate(names):
        for b in names[place + 1 :]:
            with suppress(UsageError):
                table[a, b] = rank_agreement(named[a], named[b], k=k)
    return table


def enough(scores: Scores, *, k: int = 8, share: float = 0.9, draws: int = 200, seed: int = 0) -> SubsampleAgreement:
    """Whether the `k` lowest layers would be the same on other text: two disjoint draws of 1, 2, 4, ... sequences, up
    to half of those that were measured, and the share of the k lowest on which they agree, mean over `draws`.

    Nothing is run again: the scores keep what each sequence added. Two draws are as far apart as two texts of that size
    from the same source, so that the overlap of n sequences with all of them, which contain them, is not flattered.
    Raises U539 for scores that keep no such sums, of fewer than two sequences, or fewer than `k` + 1 layers.
    """
    judged = [i for i, own in enumerate(scores.samples) if not any(map(math.isnan, own))]
    if not judged or len(scores.counts) < 2:
        raise UsageError(
            f"{scores.measure} keeps no sums of two or more sequences to draw from; use a measure that averages over "
            "tokens, and more sequences",
            code="U539",
        )
    if not 1 <= k < len(judged):
        raise UsageError(f"the {k} lowest of {len(judged)} layers are no choice; use fewer", code="U539")
    sums, counts = np.array([scores.samples[i] for i in judged]), np.array(scores.counts)
    draw = np.random.default_rng(seed)
    sizes = _sizes(len(counts) // 2)
    overlaps = []
    for size in sizes:
        alike = [_alike(sums, counts, draw.permutation(len(counts)), size, k) for _ in range(draws)]
        overlaps.append(float(np.mean(alike)))
    reached = None
    for size, overlap in zip(reversed(sizes), reversed(overlaps), strict=True):
        if overlap < share:
            break
        reached = size
    return SubsampleAgreement(k, tuple(sizes), tuple(overlaps), share, reached)


def _sizes(half: int) -> list[int]:
    """1, 2, 4, ... and `half` itself."""
    sizes = [2**power for power in range(half.bit_length()) if 2**power <= half]
    return sizes if sizes[-1] == half else [*sizes, half]


def _alike(sums: Any, counts: Any, order: Any, size: int, k: int) -> float:
    """The share of the k lowest that the first `size` sequences of `order` and the next `size` have in common."""
    first, second = order[:size], order[size : 2 * size]
    sets = []
    for rows in (first, second):
        means = sums[:, rows].sum(1) / max(counts[rows].sum(), 1e-300)
        sets.append(set(np.argsort(means, kind="stable")[:k].tolist()))
    return len(sets[0] & sets[1]) / k


def _lowest(values: Sequence[float], indices: Sequence[int], k: int) -> set[int]:
    return {i for _, i in sorted(zip(values, indices, strict=True))[:k]}
