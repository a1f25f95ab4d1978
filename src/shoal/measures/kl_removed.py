"""KL when removed: how far the next-token distributions move without a layer, whatever the text says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.evaluation.agreement import compare_logits
from shoal.evaluation.candidates import compare_each, without_each
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.scoring import logits_of
from shoal.scores import Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores

TRAITS = Traits(alone=True)


def kl_removed(
    model: Any,
    data: Data,
    *,
    part: Literal["layer", "attention", "mlp"] = "layer",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """KL(model || model without layer i), in nats per token, mean over the predicted tokens.

    KL_i = E_t[ sum over v of p_t(v) (log p_t(v) - log q_i,t(v)) ], p_t and q_i,t [vocab] the distributions after token
    t with and without layer i (or its attention or mlp). It cannot be negative, needs no right answer and has a smaller
    error than the loss, since the text's own noise is not in it.

    Source: the output criterion of Minitron (Muralidharan et al. 2024, arXiv 2407.14679) and, as a curve, of Lad et al.
    2024 (arXiv 2406.19384).

    How we differ: single removals from the whole model; float32 whatever the dtype; a layer whose removal is not legal
    gets NaN and a note. Cost: one full pass per layer. Raises U507 while a plan is running.
    """

    def logits(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return logits_of(model, ids, mask)

    def divergence(dense: torch.Tensor, without: torch.Tensor) -> list[torch.Tensor]:
        return [compare_logits(dense, without)[0][:, :-1]]

    plans = without_each(model, "KL when removed", part=part, stack=stack)
    sums, counts, refused = compare_each(
        model, data, plans, logits, divergence, what="KL when removed", batch=batch, progress=progress
    )
    rises = [own for (own,) in sums]
    return mean_scores("kl-removed", "nats per token", rises, counts, data, stack=plans.stack, notes=refused)
