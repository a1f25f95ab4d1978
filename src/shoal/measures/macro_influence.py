"""Macro influence: how much the final hidden state turns when a layer is removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from shoal.evaluation.final_states import final_state_change

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
    return final_state_change(model, data, part=part, stack=stack, batch=batch, progress=progress)
