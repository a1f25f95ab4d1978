"""Macro influence: how much the final hidden state turns when a layer is removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.evaluation.candidates import compare_each, without_each
from shoal.evaluation.distances import one_minus_cosine
from shoal.evaluation.mean_scores import mean_scores
from shoal.executing.inputs import forward_without_head

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores


def macro_influence(
    model: Any,
    data: Data,
    *,
    part: Literal["layer", "attention", "mlp"] = "layer",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """1 minus the cosine between the final hidden states of the model with and without layer i, mean over tokens.

    MI_i = 1 - E_t[ h_t . h_i,t / (|h_t| |h_i,t|) ], h and h_i [batch, length, hidden] what the head is given (behind
    the final norm) with and without layer i (or its attention or mlp), in float32.

    Source: FuseGPT (2024, arXiv 2411.14507).

    How we differ: nothing is rebuilt; padding, and the last token of each sequence, which predicts nothing that is
    known, are left out; standard errors are over sequences. Cost: one pass without the head per layer. Raises U507
    while a plan is running.
    """

    def states(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return forward_without_head(model, ids, mask)

    def turned(dense: torch.Tensor, without: torch.Tensor) -> list[torch.Tensor]:
        return [one_minus_cosine(dense, without.to(dense.device))[:, :-1].cpu()]

    plans = without_each(model, "macro influence", part=part, stack=stack)
    sums, counts, refused = compare_each(
        model, data, plans, states, turned, what="macro influence", batch=batch, progress=progress
    )
    return mean_scores(
        "macro-influence", "1 - cosine", [own for (own,) in sums], counts, data, stack=plans.stack, notes=refused
    )
