"""Residual ratio: how long what a layer adds is beside the hidden state that it makes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.observed import first_token_note, observe_tokens, without_part_note

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores


def residual_ratio(
    model: Any,
    data: Data,
    *,
    part: Literal["layer", "attention", "mlp"] = "layer",
    skip_first: int = 0,
    by: Literal["mean", "median"] = "mean",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The length of what a layer adds to the hidden state over the length of the sum, mean or median over tokens.

    r_i,t = |y_i,t - x_i,t| / |y_i,t|, x_i and y_i [batch, length, hidden] the input and output of layer i (or of its
    attention or mlp, as in block influence), in float32; by=mean E_t[ r_i,t ], by=median the middle one of all r_i,t,
    which stands in the detail as `median` in any case. It also sees what only stretches the state.

    Source: Radial Networks (Dotzel et al. 2024, arXiv 2404.04900), and Dotzel et al. (CVPR workshop 2024).

    How we differ: the papers show medians over tokens, we order by the mean unless asked, since it has a standard error
    over sequences and the median has none here. Padding is left out, the first `skip_first` tokens can be. Memory: one
    float32 for each layer and token. Raises U508, U531 and U507 as block influence does.
    """
    seen = observe_tokens(
        model, data, _ratio, what="residual ratio", skip_first=skip_first, medians=True, part=part, stack=stack,
        batch=batch, progress=progress,
    )  # fmt: skip
    means = mean_scores(
        "residual-ratio", "added / sum", seen.sums, seen.counts, data, stack=seen.stack,
        notes=(first_token_note(seen, skip_first), *without_part_note(seen, part)),
        detail={"median": seen.medians},
    )  # fmt: skip
    if by == "mean":
        return means
    notes = (*means.notes, "the median over all tokens, without a standard error")
    none = (None,) * len(seen.medians)
    return replace(means, values=tuple(seen.medians), errors=none, notes=notes, samples=(), counts=())


def _ratio(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """|y - x| / |y| for each token, [batch, length]; 0 where nothing was added."""
    added, total = (y.float() - x.float()).norm(dim=-1), y.float().norm(dim=-1)
    return torch.where(added == 0, 0.0, added / total)
