"""FFN skip: attention always runs, the mlps of the middle are left out once they change little."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from shoal.deciding.cold_regions import cold_regions
from shoal.deciding.decisions import Decision, logical_and
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import with_gates
from shoal.deciding.policy import Policy
from shoal.deciding.policy_options import share
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Plan, Run, Spec
from shoal.plan.steps import PartName

EXAMPLES = PolicyExamples(
    deciding=(
        "ffn-skip:cold_first=1,cold_last=0,threshold=0.5",
        "ffn-skip:cold_first=1,cold_last=0,threshold=0.5,of=layer",
    ),
    never=("ffn-skip:threshold=1,cold_first=0,cold_last=0",),
    refused=(
        Refusal("no calibration", "ffn-skip:cold=nowhere.json", "U658", "nowhere.json is no measurement"),
        Refusal("threshold above 1", "ffn-skip:threshold=2,cold_first=0,cold_last=0", "U586", "threshold=2"),
        Refusal("no mlp to leave", "ffn-skip", "U587", "no mlp of 4"),
        Refusal(
            "a layer without an mlp",
            "ffn-skip:cold_first=0,cold_last=0",
            "P105",
            "no mlp is known",
            family="gemma3n_text",
        ),
    ),
)


def ffn_skip(
    plan: Plan,
    spec: Spec,
    *,
    threshold: float = 0.95,
    ahead: int = 0,
    cold_first: int = 2,
    cold_last: int = 2,
    warm_up: int = 0,
    prefill: bool = False,
    of: Literal["mlp", "layer"] = "mlp",
    cold: str = "",
) -> Policy:
    """Leave out the mlps that follow one whose output is nearly its input; the KV cache stays complete.

    When cos(h_l, x_{l+1}) >= `threshold` in the middle region, h_l = x_l + attention(x_l) and x_{l+1} = h_l + mlp(h_l)
    the mlp's own input and output, the next `ahead` layers (0: all that follow in it) run their attention alone. The
    first `cold_first` and last `cold_last` layers and the first `warm_up` columns run whole, and so do prompts unless
    prefill=true. `cold` calibrates these regions instead: a file of `shoal measure MODEL --measure
    block-influence:part=mlp --json`, by which they end at the first mlp from either side whose mean cosine reaches
    `threshold`. of=layer looks at cos(x_l, x_{l+1}) of the whole layer.

    Source: Jaiswal et al. 2024 (FFN-SkipLLM, arXiv 2404.03865).

    How we differ: with several tokens or rows that decide differently the mlp runs for all of them (simulated). Raises
    U586 for a threshold outside [0, 1], U587 for regions that leave no layer, U658 for a file that calibrates none,
    P105 for layers without an mlp of their own.
    """
    layers = plan.layers()
    if cold:
        cold_first, cold_last = cold_regions(cold, layers, share("threshold", threshold))
    able = layers[cold_first : len(layers) - cold_last]
    if min(cold_first, cold_last, ahead, warm_up) < 0 or not able:
        raise UsageError(
            f"cold_first={cold_first} and cold_last={cold_last} leave no mlp of {len(layers)} layers to skip; give "
            "less",
            code="U587",
        )
    gated = with_gates(plan, spec, able, "ffn-skip", None)
    made = _FFNSkip if of == "mlp" else _ByLayer
    return made(gated, share("threshold", threshold), ahead or len(able), warm_up, prefill)


class _FFNSkip(Policy):
    leaves_out: ClassVar[PartName] = "mlp"
    watches: ClassVar[bool] = True
    watched: ClassVar[PartName] = "mlp"

    def __init__(self, plan: Plan, threshold: float, ahead: int, warm_up: int, prefill: bool) -> None:
        super().__init__(plan)
        self.threshold, self.ahead, self.warm_up, self.prefill = threshold, ahead, warm_up, prefill

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision:
        left = forward.notes.get("left")
        asked = forward.each(lambda c: c >= self.warm_up and (self.prefill or forward.generated(c)), hidden.device)
        if left is None or asked is False:
            return True
        skips = logical_and(asked, left > 0)
        return True if isinstance(skips, bool) else ~skips

    def after_run(self, run: Run, forward: ForwardView, before: torch.Tensor, after: torch.Tensor) -> None:
        if run.gate is None:
            return
        alike = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        alike = alike if alike.dim() == 2 else alike.mean(0)
        left = forward.notes.get("left")
        left = torch.zeros_like(alike, dtype=torch.long) if left is None else left
        fresh = torch.where(alike >= self.threshold, self.ahead, 0)
        forward.notes["left"] = torch.where(left > 0, left - 1, fresh)


class _ByLayer(_FFNSkip):
    watched: ClassVar[PartName] = "layer"
