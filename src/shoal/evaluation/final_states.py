"""How much the final hidden state turns when one layer more is left out of a model as it runs by now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from shoal.evaluation.candidates import compare_each, without_each
from shoal.evaluation.distances import one_minus_cosine
from shoal.evaluation.mean_scores import mean_scores
from shoal.executing.inputs import forward_without_head

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.plan import Plan
    from shoal.plan.steps import PartName
    from shoal.scores import Scores


def final_state_change(
    model: Any,
    data: Data,
    *,
    plan: Plan | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    part: PartName = "layer",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """1 - cos between the final states, [batch, length, hidden], of the model under `plan` (None: the whole model) and
    under the plan without one layer (or part) more, mean over tokens; NaN for layers that do not run. What the measure
    `macro-influence` computes."""

    def states(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return forward_without_head(model, ids, mask)

    def turned(now: torch.Tensor, without: torch.Tensor) -> list[torch.Tensor]:
        return [one_minus_cosine(now, without.to(now.device))[:, :-1].cpu()]

    plans = without_each(model, "macro influence", part=part, stack=stack, plan=plan, weights=weights)
    sums, counts, refused = compare_each(
        model, data, plans, states, turned, what="macro influence", batch=batch, progress=progress
    )
    return mean_scores(
        "macro-influence", "1 - cosine", [own for (own,) in sums], counts, data, stack=plans.stack, notes=refused
    )
