"""AdaInfer: a small classifier looks at two features of each exit and says whether to leave."""

from __future__ import annotations

from shoal.deciding.decisions import Decision, logical_and
from shoal.deciding.exit_view import ExitView
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import with_exits
from shoal.deciding.policy import Policy
from shoal.deciding.policy_options import exit_layers
from shoal.examples import PolicyExamples
from shoal.plan import Exit, Plan, Spec
from shoal.plan.sources import Fill

EXAMPLES = PolicyExamples(
    deciding=("adainfer:first=0,bias=-0.8",),
)


def adainfer(
    plan: Plan,
    spec: Spec,
    *,
    gap: float = 8.0,
    top: float = 8.0,
    bias: float = -12.0,
    first: int | None = None,
    every: int = 1,
    layers: str = "",
    head: str = "base",
    prefill: bool = False,
    fill: Fill = "project",
) -> Policy:
    """Leave at the first exit where gap x (p1 - p2) + top x p1 + bias > 0, a logistic regression on two features.

    p1 >= p2 are the two largest probabilities that norm and head give the state at the exit. `gap`, `top` and `bias`
    are fitted on recorded exits by `shoal.fitting.exits.fit_adainfer` (the label: is the exit's likeliest token
    the one that the whole model writes?); the defaults stand for "both about 0.75". Exits as for `exit`; prompts run
    whole unless prefill=true.

    Source: Fan et al. 2024 (AdaInfer, arXiv 2403.02181).

    How we differ: the paper trains a support vector machine or CRF for each model and leaves once per request; this is
    logistic regression on the same two features, for each token, with a KV fill, which the paper does not treat.
    """
    at = exit_layers(plan, layers=layers, first=first, every=every)
    return _AdaInfer(with_exits(plan, spec, at, fill, head), gap, top, bias, prefill)


class _AdaInfer(Policy):
    def __init__(self, plan: Plan, gap: float, top: float, bias: float, prefill: bool) -> None:
        super().__init__(plan)
        self.gap, self.top, self.bias, self.prefill = gap, top, bias, prefill

    def should_exit(self, step: Exit, forward: ForwardView, view: ExitView) -> Decision:
        asked = True if self.prefill else forward.decoding(view.hidden.device)
        if asked is False:
            return False
        score = self.gap * view.read("margin") + self.top * view.read("probability") + self.bias
        return logical_and(asked, score > 0)
