"""Angular distance over spans: how far the hidden state turns between the input of a span and its end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.evaluation.distances import angle
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.observed import observe_tokens
from shoal.executing.inputs import require_whole

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores


def angular_distance(
    model: Any,
    data: Data,
    *,
    span: int = 1,
    tokens: Literal["last", "all"] = "last",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The angle, in half turns, between the input of layer l and the input of layer l + span.

    d(l, n) = arccos( x_l . x_l+n / (|x_l| |x_l+n|) ) / pi in [0, 1], x_l [batch, length, hidden] the input of layer l;
    mean over sequences at the last token, or over all tokens. For one token block influence is 1 - cos(pi d(l, 1)).

    Source: Gromov et al. 2024 (arXiv 2403.17887), equation 7.

    How we differ: `tokens="all"` is offered, padding is left out, only `span` inputs are held at a time instead of all,
    and the end of the last layer is taken before the final norm. In float32 from unit vectors u and v the angle is 2
    atan2(|u - v|, |u + v|), since arccos loses half its digits near 0; it is exactly 0 for a span that adds nothing.
    Raises U503 when the span does not fit, U507 while a plan is running, as spans are the base model's own.
    """
    require_whole(model, "angular distance", stack)
    seen = observe_tokens(
        model, data, _angle, what="angular distance", span=span, only=tokens, stack=stack, batch=batch,
        progress=progress,
    )  # fmt: skip
    note = "judged at the last token of each sequence" if tokens == "last" else "all tokens counted"
    return mean_scores(
        "angular-distance", "half turns", seen.sums, seen.counts, data, stack=seen.stack, span=span, notes=(note,)
    )


def _angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The angle between two states in half turns, [batch, length]."""
    return angle(x, y) / math.pi
