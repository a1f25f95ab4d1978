"""Cosine over spans: how little the hidden state turns between the input of a span and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.evaluation.distances import one_minus_cosine
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.observed import first_token_note, observe_tokens

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores


def cosine_span(
    model: Any,
    data: Data,
    *,
    span: int = 1,
    skip_first: int = 0,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """1 minus the cosine between the input of layer l and the input of layer l + span, mean over tokens.

    s(l, n) = 1 - E_t[ x_l,t . x_l+n,t / (|x_l,t| |x_l+n,t|) ], x_l [batch, length, hidden] the input of layer l, in
    float32. The span that starts at the lowest l is the one to remove or to replace; for n = 1 it is block influence.

    Source: LLM-Streamline (Chen et al. 2024, arXiv 2403.19135), where the highest cosine wins.

    How we differ: the score is 1 - cosine, so that the lowest goes first as everywhere; the released code maps the
    cosine to 0.5 + 0.5 cos (the same order) and takes spans of n + 1 layers, since one of them becomes the stand-in;
    padding is left out, the first `skip_first` tokens can be; standard errors are over sequences; only `span` inputs
    are held at a time. Raises U503 when the span does not fit, U508 when no token is left, U507 while a plan is running
    for spans of several layers.
    """
    seen = observe_tokens(
        model, data, one_minus_cosine, what="cosine over spans", span=span, skip_first=skip_first, stack=stack,
        batch=batch, progress=progress,
    )  # fmt: skip
    note = first_token_note(seen, skip_first)
    return mean_scores(
        "cosine-span", "1 - cosine", seen.sums, seen.counts, data, stack=seen.stack, span=span, notes=(note,)
    )
