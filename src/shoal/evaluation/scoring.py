"""The shared ground of quality measures: which tokens of a window count, and their cross-entropy in float32."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from shoal.data import Data, DataInfo
from shoal.errors import DataError, UsageError
from shoal.evaluation.distances import at_least_float32
from shoal.executing.inputs import inputs_of
from shoal.models.context import positions_of
from shoal.models.evaluating import evaluating

Progress = Callable[[int, int, str], None]
"""Called with units done, units in all, and the stage."""

CHUNK_ELEMENTS = 1 << 23


def accepts(model: Any, argument: str) -> bool:
    """Whether the model's forward names this argument."""
    return argument in inspect.signature(model.forward).parameters


def require_context(model: Any, tokens: int) -> None:
    """Raise `UsageError` U510 if `tokens` are more positions than the model has."""
    limit = positions_of(model)
    if limit is not None and limit < tokens:
        raise UsageError(f"{tokens} tokens are more than the {limit} positions of this model; use fewer", code="U510")


def logits_of(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits [batch, length, vocab] in the model's dtype for `ids` [batch, length], uncached."""
    logits: torch.Tensor = model(**inputs_of(model, ids, mask), use_cache=False).logits
    return logits


def windows(
    data: Data, batch: int, progress: Progress | None, stage: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """Ids, mask and `scored_tokens` of `batch` windows at a time; reports after each."""
    done = 0
    for ids, mask in data.batches(batch):
        yield ids, mask, scored_tokens(data.info, ids, mask, first=done)
        done += len(ids)
        if progress is not None:
            progress(done, len(data), stage)


def scored_tokens(info: DataInfo, ids: torch.Tensor, mask: torch.Tensor | None, *, first: int) -> torch.Tensor:
    """Which of the `length - 1` predicted tokens count, bool [batch, length - 1]; `first` numbers the first window.

    Windows that overlap score only their last `stride` tokens, all but the first window, so that each token of the
    text counts once, with the most context there is. A token counts if it and its predecessor are not padding.
    """
    keep = torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool)
    overlap = max(0, ids.shape[1] - 1 - info.stride)
    keep[1 if first == 0 else 0 :, :overlap] = False
    if mask is not None:
        keep &= (mask[:, 1:] * mask[:, :-1]).cpu().bool()
    return keep


def chunks(length: int, vocab: int) -> Iterator[slice]:
    """Slices of positions, small enough for a few float32 copies of their logits."""
    step = max(1, CHUNK_ELEMENTS // vocab)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def token_nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each next token, float64 [batch, length - 1] on the CPU, computed in the dtype of
    the logits, at least float32."""
    targets = ids[:, 1:].to(logits.device)
    rows = []
    for row, wanted in zip(logits, targets, strict=True):
        parts = [
            torch.nn.functional.cross_entropy(at_least_float32(row[part]), wanted[part], reduction="none")
            for part in chunks(len(wanted), row.shape[-1])
        ]
        rows.append(torch.cat(parts))
    return torch.stack(rows).cpu().double()


def sequence_nll(
    model: Any, data: Data, *, batch: int = 1, progress: Progress | None = None, stage: str = "perplexity"
) -> tuple[tuple[float, int], ...]:
    """The sum of the cross-entropy in nats and the number of scored tokens of each window, in order.

    Raises `UsageError` U510 for windows longer than the model's context, `DataError` D420 if no token is scored.
    """
    require_context(model, data.ids.shape[1])
    results: list[tuple[float, int]] = []
    with evaluating(model):
        for ids, mask, keep in windows(data, batch, progress, stage):
            sums = batch_tokens(model, ids, mask, keep).sum(-1)
            results += zip(sums.tolist(), keep.sum(-1).tolist(), strict=True)
    require_scored(sum(count for _, count in results), data)
    return tuple(results)


def batch_tokens(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, keep: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each next token of one batch from `windows`, 0 where it is not scored: float64
    [batch, length - 1] on the CPU. No gradients and no dropout are the caller's business."""
    return torch.where(keep, token_nll(logits_of(model, ids, mask), ids), 0.0)


def require_scored(tokens: int, data: Data) -> None:
    """Raise `DataError` D420 if padding left nothing to predict."""
    if not tokens:
        message = f"{data.info.source} has no token to predict behind its padding; use longer texts"
        raise DataError(message, code="D420")
