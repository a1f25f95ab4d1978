"""Patience: leave when several exits in a row would say the same."""

from __future__ import annotations

import torch

from shoal.deciding.decisions import Decision, logical_and
from shoal.deciding.exit_view import ExitView
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import with_exits
from shoal.deciding.policy import Policy
from shoal.deciding.policy_options import exit_layers
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Exit, Plan, Spec
from shoal.plan.sources import Fill

EXAMPLES = PolicyExamples(
    deciding=("patience:first=0",),
    never=("patience:agree=9,first=0",),
    refused=(Refusal("patience of one", "patience:agree=1", "U587", "agree=1"),),
)


def patience(
    plan: Plan,
    spec: Spec,
    *,
    agree: int = 2,
    first: int | None = None,
    every: int = 1,
    layers: str = "",
    head: str = "base",
    prefill: bool = False,
    fill: Fill = "project",
) -> Policy:
    """Leave at the first exit whose likeliest token is also that of the `agree` - 1 exits before it.

    a_i = argmax_v p_i(v) at exit i; a token leaves at the first i with a_i = a_{i-1} = ... = a_{i-agree+1}. Exits are
    behind every `every`-th layer from `first` on (default: the middle), or behind `layers`. Prompts run whole unless
    prefill=true.

    Source: Zhou et al. 2020 (PABEE, arXiv 2006.04152).

    How we differ: the shared head of the language model reads every exit, so that no classifier is trained; each token
    is counted for itself. Raises U587 for agree under 2.
    """
    if agree < 2:
        raise UsageError(f"agree={agree} asks no second exit; give 2 or more", code="U587")
    at = exit_layers(plan, layers=layers, first=first, every=every)
    return _Patience(with_exits(plan, spec, at, fill, head), agree, prefill)


class _Patience(Policy):
    def __init__(self, plan: Plan, agree: int, prefill: bool) -> None:
        super().__init__(plan)
        self.agree, self.prefill = agree, prefill

    def should_exit(self, step: Exit, forward: ForwardView, view: ExitView) -> Decision:
        asked = True if self.prefill else forward.decoding(view.hidden.device)
        if asked is False:
            return False
        choice = view.read("choice")
        before, run = forward.notes.get("said", (None, None))
        run = torch.ones_like(choice) if before is None else torch.where(choice == before, run + 1, 1)
        forward.notes["said"] = choice, run
        return logical_and(asked, run >= self.agree)
