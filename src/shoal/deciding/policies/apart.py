"""Apart: one plan for the prompt, another one for what is written."""

from __future__ import annotations

from typing import Literal

from shoal.deciding.gating import fill_for, with_gates
from shoal.deciding.policy import Policy, Schedule
from shoal.deciding.policy_options import kept_layers
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Plan, Spec

EXAMPLES = PolicyExamples(
    deciding=("apart:decode=0,3",),
    always={"apart:prefill=0,2-3,decode=0,2-3": "0,2-3"},
    refused=(Refusal("no fill after a shallow prompt", "apart:prefill=0-1,fill=none", "U582", "fill=project"),),
)


def apart(
    plan: Plan,
    spec: Spec,
    *,
    prefill: str = "",
    decode: str = "",
    fill: Literal["auto", "none", "project", "copy", "mask"] = "auto",
) -> Policy:
    """Run some layers for the prompt and others for generated tokens.

    x_{l+1} = layer_l(x_l) for l in K and x_l elsewhere, with K = `prefill` (0-29) while the prompt is read and `decode`
    (0-9,20-29) behind it; a list that is left out keeps all layers of the plan. When every layer that decodes has read
    the prompt, no KV fill is needed; otherwise fill=auto projects.

    Source: skipping in decoding alone: Liu et al. 2024 (unified layer skipping, arXiv 2404.06954); shares for the two
    phases apart: He et al. 2025 (AdaSkip, arXiv 2501.02336).

    How we differ: which layers run is given, not found. Raises U584 for a list that is none of the plan's layers.
    """
    layers = plan.layers()
    kept = kept_layers(plan, prefill), kept_layers(plan, decode)
    made = _Apart(plan, *(frozenset(layers) - frozenset(one) for one in kept))
    rule = fill_for(made, fill)
    made.plan = with_gates(plan, spec, sorted(made.prompt | made.decode), "apart", rule)
    return made


class _Apart(Schedule):
    def __init__(self, plan: Plan, prompt: frozenset[int], decode: frozenset[int]) -> None:
        super().__init__(plan)
        self.prompt, self.decode = prompt, decode

    def skipped(self, column: int, generated: bool) -> frozenset[int]:
        return self.decode if generated else self.prompt
