"""How far a pruned model's next-token distributions are from the dense model's, without looking at the right answer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shoal.data import Data, DataInfo
from shoal.errors import UsageError
from shoal.evaluation.distances import kl_divergence
from shoal.evaluation.perplexity import Perplexity, summarise
from shoal.evaluation.scoring import Progress, chunks, logits_of, require_context, require_scored, token_nll, windows
from shoal.evaluation.stats import ratio
from shoal.models.evaluating import evaluating

Logits = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Means over the same tokens as `perplexity` counts; errors as there, None for a single window."""

    kl: float
    """KL(dense || pruned) in nats per token."""
    kl_error: float | None
    top1: float
    """Share of tokens for which both models rank the same token first."""
    top1_error: float | None
    tokens: int
    info: DataInfo

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A dense and a pruned model on the same windows, each computed once."""

    dense: Perplexity
    pruned: Perplexity
    agreement: Agreement


def compare(
    model: Any, data: Data, *, dense: Context, pruned: Context, batch: int = 1, progress: Progress | None = None
) -> Comparison:
    """One resident `model` compared with itself under two context managers, window by window.

    `dense` and `pruned` make the context managers, e.g. `contextlib.nullcontext` and `lambda: running(model, plan)`.
    Raises `UsageError` U510 for windows longer than the context.
    """
    require_context(model, data.ids.shape[1])
    return compare_sides(_under(model, dense), _under(model, pruned), data, batch, progress)


def compare_between(
    dense: Any, pruned: Any, data: Data, *, batch: int = 1, progress: Progress | None = None
) -> Comparison:
    """Two models that share a vocabulary compared. Raises `UsageError` U510 (context) or U511 (vocabulary)."""
    for model in (dense, pruned):
        require_context(model, data.ids.shape[1])
    return compare_sides(_under(dense), _under(pruned), data, batch, progress)


def _under(model: Any, context: Context | None = None) -> Logits:
    def logits(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if context is None:
            with evaluating(model):
                return logits_of(model, ids, mask)
        # `evaluating` inside, so that modules which the context puts in leave training mode too.
        with context(), evaluating(model):
            return logits_of(model, ids, mask)

    return logits


def compare_sides(dense: Logits, pruned: Logits, data: Data, batch: int, progress: Progress | None) -> Comparison:
    """Two makers of logits compared, each asked for every batch of windows in order. Raises `DataError` D420."""
    divergences: list[float] = []
    matches: list[float] = []
    losses: tuple[list[float], list[float]] = ([], [])
    counts: list[int] = []
    for ids, mask, keep in windows(data, batch, progress, "dense and pruned"):
        sides = dense(ids, mask), pruned(ids, mask)
        kl, same = compare_logits(*sides)
        divergences += torch.where(keep, kl[:, :-1], 0.0).sum(-1).tolist()
        matches += (keep & same[:, :-1]).sum(-1).tolist()
        for loss, logits in zip(losses, sides, strict=True):
            loss.extend(torch.where(keep, token_nll(logits, ids), 0.0).sum(-1).tolist())
        counts += keep.sum(-1).tolist()
    require_scored(sum(counts), data)
    dense_nll, pruned_nll = (list(zip(sums, counts, strict=True)) for sums in losses)
    return Comparison(
        summarise(dense_nll, data.info),
        summarise(pruned_nll, data.info),
        Agreement(*ratio(divergences, counts), *ratio(matches, counts), sum(counts), data.info),
    )


def compare_logits(dense: torch.Tensor, pruned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL in nats (float64) and whether the first choice is the same (bool), [batch, length] on the CPU.

    KL = sum over v of p(v) (log p(v) - log q(v)), where tokens with p(v) = 0 add nothing; in float32 (float64 for
    float64 logits), in the form of `kl_divergence`, which keeps its digits when the two are nearly the same.
    """
    if dense.shape != pruned.shape:
        message = f"logits of shapes {list(dense.shape)} and {list(pruned.shape)} cannot be compared"
        raise UsageError(f"{message}; use models with one vocabulary", code="U511")
    divergences, matches = [], []
    for p_row, q_row in zip(dense, pruned, strict=True):
        parts = [_compare(p_row[part], q_row[part]) for part in chunks(p_row.shape[0], p_row.shape[1])]
        divergences.append(torch.cat([kl for kl, _ in parts]))
        matches.append(torch.cat([same for _, same in parts]))
    return torch.stack(divergences).cpu().double(), torch.stack(matches).cpu()


def _compare(dense: torch.Tensor, pruned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pruned = pruned.to(dense.device)
    return kl_divergence(dense, pruned), dense.argmax(-1) == pruned.argmax(-1)
