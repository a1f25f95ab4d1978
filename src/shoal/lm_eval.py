"""lm-eval's own command line, with models of Shoal: `python -m shoal.lm_eval run --model shoal ...`.

    python -m shoal.lm_eval run --model shoal --tasks lambada_openai \\
        --model_args '{"pretrained": "smollm2", "plan": "0-27,29", "policy": "exit:confidence=0.9"}'

Everything that `lm_eval` takes is taken, and its results are written as it writes them. Other programs that use lm-eval
import this module, which registers the model type `shoal`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from shoal.errors import ShoalError
from shoal.live import apply
from shoal.models.load import load
from shoal.plan import Plan, is_plan_file


@register_model("shoal")
class ShoalLM(HFLM):
    """A model that Shoal loads, under a plan, a policy, both or neither, as lm-eval asks models.

    `pretrained`: what `shoal.load` takes. `plan`: as typed, or a file or folder that holds one, with the tensors that
    it names; a plan with commas needs the JSON form of --model_args. `policy`: as typed. Everything else is the
    argument of lm-eval's model type `hf` of that name. What is scored is what `shoal evaluate --tasks` scores.
    """

    def __init__(
        self,
        pretrained: str,
        plan: str | int | None = None,
        policy: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        trust_remote_code: bool = False,
        **more: Any,
    ) -> None:
        """Raises what `shoal.load` and `shoal.apply` raise."""
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None  # lm-eval's default, which its own models leave like this too
        loaded = load(pretrained, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        if plan is not None or policy is not None:
            text = "" if plan is None else str(plan)
            given = Path(text) if is_plan_file(text) else text or Plan.identity(loaded.opened.spec)
            self.running = apply(loaded.model, given, policy=policy)
        own = {"tokenizer": loaded.tokenizer, "backend": "causal", "trust_remote_code": trust_remote_code}
        super().__init__(pretrained=loaded.model, **own | more)


def main() -> int:
    """Run lm-eval's command line; the exit status is 1 for what is the user's to mend."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ShoalError as error:
        sys.stderr.write(f"shoal: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
