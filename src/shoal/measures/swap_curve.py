"""Swap curve: what it costs to run two neighbouring layers in the other order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from shoal.evaluation.agreement import compare_logits
from shoal.evaluation.candidates import Candidates, compare_each
from shoal.evaluation.mean_scores import mean_scores
from shoal.evaluation.scoring import logits_of
from shoal.executing.inputs import require_whole
from shoal.models.opened import open_model
from shoal.plan import Plan, check, reorder
from shoal.scores import Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.plan import Spec
    from shoal.scores import Scores

TRAITS = Traits(null="silent", least=False)


def swap_curve(
    model: Any, data: Data, *, stack: str | None = None, batch: int = 1, progress: Progress | None = None
) -> Scores:
    """KL(model || model with layers i and i + 1 swapped), in nats per token, mean over the predicted tokens.

    s_i = E_t[ KL(p_t || q_i,t) ] for i = 0 .. depth - 2, p_t and q_i,t [vocab] the distributions after token t in the
    model's own order and in the swapped one. The detail holds `top1`, the share of tokens whose first choice stays. 0
    where one of the two adds nothing, or where both are one layer twice. A diagnostic: layers that may change places
    form a stage of the model, but that they commute does not say that either may go.

    Source: Lad et al. 2024 (arXiv 2406.19384).

    How we differ: KL orders the curve, top-1 agreement stands beside it; a swap that is not legal or that the family's
    loop cannot run gets NaN and a note. Cost: one full pass per pair. Raises U507 while a plan is running.
    """

    def logits(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return logits_of(model, ids, mask)

    def change(dense: torch.Tensor, swapped: torch.Tensor) -> list[torch.Tensor]:
        divergence, same = compare_logits(dense, swapped)
        return [divergence[:, :-1], same[:, :-1]]

    require_whole(model, "the swap curve", stack)
    plans = _swaps(open_model(model).spec, stack)
    sums, counts, refused = compare_each(
        model, data, plans, logits, change, what="swap curve", batch=batch, progress=progress
    )
    return mean_scores(
        "swap-curve", "nats per token", [own for own, _ in sums], counts, data, stack=plans.stack, span=2,
        notes=refused, detail={"top1": [math.fsum(own) / sum(counts) for _, own in sums]}, removal=False,
    )  # fmt: skip


def _swaps(spec: Spec, stack: str | None) -> Candidates:
    """The plan with layers i and i + 1 in the other order, for each i."""
    identity, depth = Plan.identity(spec), spec.stack(stack).depth
    plans: list[Plan | None] = []
    refused = []
    for first in range(depth - 1):
        order = [*range(first), first + 1, first, *range(first + 2, depth)]
        plan = reorder(identity, order, stack=stack)
        problems = check(plan, spec)
        refused += [f"layers {first} and {first + 1} were not swapped: {problem}" for problem in problems[:1]]
        plans.append(None if problems else plan)
    return Candidates(spec.stack(stack).name, tuple(plans), tuple(refused))
