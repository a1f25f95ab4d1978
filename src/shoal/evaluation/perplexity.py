"""Perplexity: exp of the mean cross-entropy of each token given the tokens before it in its window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shoal.data import Data, DataInfo
from shoal.evaluation.scoring import Progress, sequence_nll
from shoal.evaluation.stats import ratio


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity on one piece of data. A broken model gives inf or nan, never an exception."""

    value: float
    nll: float
    """Mean cross-entropy in nats per token, weighted by tokens; `value` is its exponential."""
    error: float | None
    """Standard error of `nll` with the window as the unit of sampling; None for a single window."""
    tokens: int
    """Tokens that were predicted and counted."""
    per_sequence: tuple[float, ...]
    """Mean cross-entropy of each window in nats per token; 0 where nothing was counted."""
    per_sequence_tokens: tuple[int, ...]
    info: DataInfo

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(model: Any, data: Data, *, batch: int = 1, progress: Progress | None = None) -> Perplexity:
    """Perplexity of the live causal language model on `data`.

    Without overlap a window of `length` tokens predicts `length - 1`; with `stride < length` every window after the
    first counts only its last `stride` tokens. Raises `UsageError` U510 for windows longer than the context.
    """
    return summarise(sequence_nll(model, data, batch=batch, progress=progress), data.info)


def summarise(scored: Sequence[tuple[float, int]], info: DataInfo) -> Perplexity:
    """Perplexity from the cross-entropy sum and the token count of each window."""
    counts = tuple(count for _, count in scored)
    nll, error = ratio([total for total, _ in scored], counts)
    means = tuple(total / count if count else 0.0 for total, count in scored)
    return Perplexity(_exp(nll), nll, error, sum(counts), means, counts, info)


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
