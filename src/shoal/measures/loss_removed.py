"""Loss when removed: what each layer is worth to the model as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.evaluation.candidates import compare_each, without_each
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.scoring import logits_of, token_nll
from shoal.models.kinds import require_causal
from shoal.scores import Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores

TRAITS = Traits(alone=True)


def loss_removed(
    model: Any,
    data: Data,
    *,
    part: Literal["layer", "attention", "mlp"] = "layer",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The rise of the cross-entropy, in nats per token, when one layer (or its attention or mlp) is removed.

    delta_i = NLL(model without i) - NLL(model), token-weighted mean over sequences, paired sequence by sequence; the
    standard error is that of the paired differences.

    Source: the one-shot form of SLEB's metric (Song et al. 2024, arXiv 2402.09025, section 3) and of Shortened LLaMA's
    perplexity criterion (Kim et al. 2024, arXiv 2402.02834).

    How we differ: nothing is rebuilt, the layer is left out of the running model; a layer whose removal is not legal
    gets NaN and a note. Cost: one full pass per layer. Raises U507 while a plan is running.
    """
    require_causal(model, "loss when removed")

    def losses(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return token_nll(logits_of(model, ids, mask), ids)

    plans = without_each(model, "loss when removed", part=part, stack=stack)
    sums, counts, refused = compare_each(
        model, data, plans, losses, lambda dense, without: [without - dense], what="loss when removed", batch=batch,
        progress=progress,
    )  # fmt: skip
    return mean_scores(
        "loss-removed", "nats per token", [own for (own,) in sums], counts, data, stack=plans.stack, notes=refused
    )
