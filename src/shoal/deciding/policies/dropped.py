"""Dropped: in training each sequence leaves layers out at random; behind it every layer runs."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch

from shoal.deciding.decisions import Decision
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import with_gates
from shoal.deciding.policy import Grain, Policy
from shoal.deciding.policy_options import share
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Plan, Run, Spec

EXAMPLES = PolicyExamples(
    never=("dropped", "dropped:most=0.5,by=uniform"),
    refused=(Refusal("more than all", "dropped:most=1.5", "U586", "most=1.5"),),
)


def dropped(
    plan: Plan,
    spec: Spec,
    *,
    most: float = 0.1,
    by: Literal["depth", "uniform"] = "depth",
    rises: bool = False,
) -> Policy:
    """In training leave each layer out for a whole sequence with the probability p(l, t) = S(t) D(l) `most`.

    D(l) = exp(l ln 2 / (L - 1)) - 1 for layer l of L, from 0 at the first to 1 at the last; `by` uniform: D = 1.
    S(t) = 1, or with `rises` exp(t ln 2) - 1 from 0 at the beginning of the stage to 1 at its end. Where nothing is
    trained, and on held-out text, every layer runs.

    Source: layer dropout of Elhoushi et al. 2024 (LayerSkip, arXiv 2404.16710, section 3.1.1); uniform: Fan et al. 2019
    (LayerDrop, arXiv 1909.11556).

    How we differ: what is left out is drawn before the first layer, from the step's own generator, so that layers that
    gradient checkpointing runs again are left out again.
    """
    return _Dropped(with_gates(plan, spec, plan.layers(), "dropped", "project"), share("most", most), by, rises)


class _Dropped(Policy):
    grain: ClassVar[Grain] = "row"
    only_training: ClassVar[bool] = True

    def __init__(self, plan: Plan, most: float, by: str, rises: bool) -> None:
        super().__init__(plan)
        self.most, self.by, self.rises = most, by, rises
        self.places = {layer: place for place, layer in enumerate(plan.layers())}

    def probability(self, layer: int, progress: float) -> float:
        """With which a layer is left out."""
        depth = len(self.places)
        rate = 1.0 if self.by == "uniform" else math.expm1(self.places[layer] * math.log(2) / max(1, depth - 1))
        return self.most * rate * (math.expm1(progress * math.log(2)) if self.rises else 1.0)

    def begin(self, forward: ForwardView) -> None:
        if forward.learning is None or not torch.is_grad_enabled():
            return
        drawn = torch.rand(len(self.places), forward.rows, generator=forward.learning.generator)
        forward.notes["runs"] = {
            layer: drawn[place] >= self.probability(layer, forward.learning.progress)
            for layer, place in self.places.items()
        }

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision:
        rows = forward.notes.get("runs", {}).get(run.layer)
        return True if rows is None else rows[:, None].expand(-1, forward.tokens).to(hidden.device)
