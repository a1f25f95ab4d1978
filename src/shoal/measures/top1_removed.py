"""Top-1 change when removed: for how many tokens the model's first choice becomes another one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.evaluation.agreement import compare_logits
from shoal.evaluation.candidates import compare_each, without_each
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.scoring import logits_of

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores


def top1_removed(
    model: Any,
    data: Data,
    *,
    part: Literal["layer", "attention", "mlp"] = "layer",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The share of tokens whose first choice changes when one layer (or its attention or mlp) is
    removed: the delete curve.

    c_i = E_t[ argmax_v p_t(v) != argmax_v q_i,t(v) ], p_t and q_i,t [vocab] the distributions after token t with and
    without layer i; 1 - c_i is the agreement of the paper's curve. The detail holds `kl`, KL(p || q_i) in nats per
    token, by layer.

    Source: Lad et al. 2024 (arXiv 2406.19384).

    How we differ: every layer of the whole model is judged, the first and the last too; a layer whose removal is not
    legal gets NaN and a note; standard errors are over sequences. Cost: one full pass per layer. Raises U507 while a
    plan is running.
    """

    def logits(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return logits_of(model, ids, mask)

    def change(dense: torch.Tensor, without: torch.Tensor) -> list[torch.Tensor]:
        divergence, same = compare_logits(dense, without)
        return [~same[:, :-1], divergence[:, :-1]]

    plans = without_each(model, "top-1 change when removed", part=part, stack=stack)
    sums, counts, refused = compare_each(
        model, data, plans, logits, change, what="top-1 change when removed", batch=batch, progress=progress
    )
    return mean_scores(
        "top1-removed", "share of tokens", [changed for changed, _ in sums], counts, data, stack=plans.stack,
        notes=refused, detail={"kl": [math.fsum(own) / sum(counts) for _, own in sums]},
    )  # fmt: skip
