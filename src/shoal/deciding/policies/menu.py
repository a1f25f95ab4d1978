"""Menu: a few plans, one of which is chosen for each call."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from shoal.deciding.decisions import Decision
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import with_gates
from shoal.deciding.policy import Grain, Policy
from shoal.deciding.policy_options import kept_layers, share
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Plan, Run, Spec

EXAMPLES = PolicyExamples(
    deciding=("menu:plans=0-3+0-1+0,3,choose=turn",),
    never=("menu:plans=0-3+0,3,confidence=1",),
    refused=(
        Refusal("a menu of one", "menu:plans=0-3", "U584", "two lists"),
        Refusal("a menu of other layers", "menu:plans=0-3+0,9", "U584", "layer 9"),
    ),
)


def menu(
    plan: Plan,
    spec: Spec,
    *,
    plans: str = "",
    choose: Literal["confidence", "turn"] = "confidence",
    confidence: float = 0.9,
    fill: Literal["project", "copy", "mask"] = "project",
) -> Policy:
    """Choose one of a few sets of layers for each call, by how sure the last token was.

    `plans` = 0-29+0-19,25-29+0-9,25-29: lists of the layers that run, from deep to shallow, joined by +. Prompts take
    the first. choose=confidence: the next one after a token whose probability was at least `confidence` in every row,
    the first again after any other; choose=turn: one after the other by column, which a test can replay. A call takes
    one of finitely many paths, so nothing is simulated, and each path can be compiled by itself.

    Source: a finite menu instead of free gates: DyCE (Wang et al. 2024, arXiv 2403.01695) switches whole configurations
    at run time.

    How we differ: DyCE switches by load; this looks at the last token. Raises U584 for fewer than two lists.
    """
    pieces = [piece for piece in plans.split("+") if piece]
    if len(pieces) < 2:
        raise UsageError(
            f"plans={plans!r:.60} is no menu; give two lists of layers or more, as in 0-29+0-9", code="U584"
        )
    layers = frozenset(plan.layers())
    out = [layers - frozenset(kept_layers(plan, piece)) for piece in pieces]
    gone = sorted(frozenset().union(*out))
    return _Menu(with_gates(plan, spec, gone, "menu", fill), out, share("confidence", confidence), choose)


class _Menu(Policy):
    grain: ClassVar[Grain] = "call"
    reads_logits: ClassVar[bool] = True

    def __init__(self, plan: Plan, out: list[frozenset[int]], threshold: float, choose: str) -> None:
        super().__init__(plan)
        self.out, self.threshold, self.choose = out, threshold, choose

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision:
        chosen = forward.memory.get("chosen", 0)

        def wanted(column: int) -> bool:
            number = column % len(self.out) if self.choose == "turn" else chosen
            return not forward.generated(column) or run.layer not in self.out[number]

        return forward.each(wanted, hidden.device)

    def after_forward(self, forward: ForwardView, logits: torch.Tensor) -> None:
        sure = bool((logits.float().softmax(-1).amax(-1) >= self.threshold).all())
        forward.memory["chosen"] = min(forward.memory.get("chosen", 0) + 1, len(self.out) - 1) if sure else 0
