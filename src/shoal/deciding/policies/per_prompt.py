"""Per prompt: what the prompt shows to change little is left out of the answer."""

from __future__ import annotations

from typing import ClassVar

import torch

from shoal.deciding.decisions import Decision
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import with_gates
from shoal.deciding.policy import Grain, Policy
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Plan, Run, Spec

EXAMPLES = PolicyExamples(  # nothing that decides: a pass without a cache has chosen nothing yet
    refused=(Refusal("drop more than there is", "per-prompt:skip=3", "U587", "skip=3 of 2"),),
)


def per_prompt(plan: Plan, spec: Spec, *, skip: int = 4, keep_first: int = 1, keep_last: int = 1) -> Policy:
    """Read the prompt with all layers, then decode each sequence without the `skip` that changed its states least.

    s_l = mean over the prompt's real tokens t of cos(x_l,t, x_{l+1,t}), x [tokens, hidden]; the `skip` layers with the
    largest s_l are skipped for every token after the prompt, row by row, but never the first `keep_first` and the last
    `keep_last`. A layer is complete in the KV cache or never read again, so no fill is needed. Rows of a batch that
    choose differently are simulated: the layer runs for all of them.

    Source: one decision for each prompt: Jain et al. 2024 (FiRST, arXiv 2410.12513); cosine in prefill instead of a
    router: He et al. 2025 (AdaSkip, arXiv 2501.02336).

    How we differ: no router is trained and whole layers are left out; the number that is left out is given. In a pass
    without a cache nothing has been chosen yet, so all layers run. Raises U587 for more than can be left out.
    """
    able = plan.layers()[keep_first : len(plan.layers()) - keep_last]
    if not 0 < skip <= len(able):
        raise UsageError(
            f"skip={skip} of {len(able)} layers that may go is none to choose; give a number from 1 to {len(able)}",
            code="U587",
        )
    return _PerPrompt(with_gates(plan, spec, able, "per-prompt", None), skip)


class _PerPrompt(Policy):
    grain: ClassVar[Grain] = "row"
    watches: ClassVar[bool] = True
    consistent = True

    def __init__(self, plan: Plan, number: int) -> None:
        super().__init__(plan)
        self.number = number

    def begin(self, forward: ForwardView) -> None:
        alike: dict[int, torch.Tensor] = forward.memory.setdefault("alike", {})
        if forward.past > 0 and alike and "chosen" not in forward.memory:
            # the layers of one model may be on several devices
            ranks = torch.stack([one.cpu() for one in alike.values()]).argsort(0, descending=True)
            # by base layer, bool [batch]: the sequences that skip it
            forward.memory["chosen"] = {
                layer: (ranks[: self.number] == place).any(0).to(alike[layer].device)
                for place, layer in enumerate(alike)
            }

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision:
        skip = forward.memory.get("chosen", {}).get(run.layer)
        return True if skip is None else ~skip[:, None].expand(-1, forward.tokens)

    def after_run(self, run: Run, forward: ForwardView, before: torch.Tensor, after: torch.Tensor) -> None:
        if forward.past > 0 or run.gate is None:
            return
        alike = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        alike = alike if alike.dim() == 2 else alike.mean(0)
        real = torch.ones_like(alike) if forward.real is None else forward.real.to(alike)
        forward.memory["alike"][run.layer] = (alike * real).sum(-1) / real.sum(-1).clamp(min=1)
