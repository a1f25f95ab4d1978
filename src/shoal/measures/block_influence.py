"""Block influence: how much a layer turns the hidden state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from shoal.evaluation.distances import one_minus_cosine
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.observed import first_token_note, observe_tokens, without_part_note

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores


def block_influence(
    model: Any,
    data: Data,
    *,
    part: Literal["layer", "attention", "mlp"] = "layer",
    skip_first: int = 0,
    tokens: Literal["all", "first", "last"] = "all",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """1 minus the cosine between a layer's input and output, mean over tokens.

    BI_i = 1 - E_t[ x_i,t . y_i,t / (|x_i,t| |y_i,t|) ], x_i and y_i [batch, length, hidden] the input and output of
    layer i, in float32; of its attention: the input and the state with the attention added; of its mlp: that state and
    the output.

    Source: ShortGPT (Men et al. 2024, arXiv 2403.03853), equation 1; for parts He et al. 2024 (arXiv 2406.15786).

    How we differ: padding is left out; the first `skip_first` tokens of each sequence can be (attention sinks: their
    states are a hundred times longer and hardly turn), and a note says whether that changes the order; `tokens` can be
    the first or the last of each sequence alone; each layer has a standard error over sequences; 1 - cos is computed as
    |x/|x| - y/|y||^2 / 2, which keeps its digits when it is small and is exactly 0 for a layer that adds nothing. Under
    a running plan a layer that does not run gets NaN, one that runs more than once the mean over its runs. Cost: one
    pass without the head, for parts with each attention computed twice; nothing stored but two sums per layer and
    sequence. Raises U508 when `skip_first` leaves no token, U531 for
    parts that no layer has, U507 for parts while a plan is running.
    """
    seen = observe_tokens(
        model, data, one_minus_cosine, what="block influence", skip_first=skip_first, only=tokens, part=part,
        stack=stack, batch=batch, progress=progress,
    )  # fmt: skip
    notes = (first_token_note(seen, skip_first), *without_part_note(seen, part))
    return mean_scores(
        "block-influence", "1 - cosine", seen.sums, seen.counts, data, stack=seen.stack, notes=notes,
        detail={} if part == "layer" else {"part": part},
    )  # fmt: skip
