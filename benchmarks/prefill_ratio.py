"""Whether a dropped layer's FLOPs are saved as time: prefill of a 24-layer plan against the dense model.

Target: time(24 layers) / time(dense) is at most 1.05 times the ratio of prefill FLOPs that `shoal.cost` predicts, by
the wall clock, for the rewritten stock model and for the plan run live. A prefill is one forward over 512 tokens that
fills a new cache and computes the logits of the last position, as `generate` does it. All three run in every round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from _common import PRUNED, Timed, compared, finish, opened, options, paired, say, timed, times

from shoal.evaluation.decoding import Stepper, random_tokens
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Plan, Spec, cost, parse_plan
from shoal.plan.cost import Shape
from shoal.writing.surgery import rewrite

SLACK = 1.05


def main() -> int:
    """Measure and print; the exit status says whether both targets were met."""
    args = _arguments()
    model = opened(args).model
    spec = inspect(model)
    plan = parse_plan(args.plan, Plan.identity(spec))
    stock = rewrite(model, plan).eval()
    ids = random_tokens(model, 1, args.prompt, seed=0)
    say(f"{args.model}: {spec.stack().depth} layers against {len(plan.layers())}, prompt {args.prompt}")
    variants = {
        "dense": prefill(model, ids, nullcontext),
        "rewritten": prefill(stock, ids, nullcontext),
        "live": prefill(model, ids, lambda: running(model, plan)),
    }
    samples = paired(variants, args.pairs)
    predicted = predicted_ratio(plan, spec, args.prompt)
    ratios = {name: compared(samples, name, "dense") for name in ("rewritten", "live")}
    figures = {
        "plan": str(plan),
        "predicted_flops_ratio": predicted,
        "time_ratio": ratios,
        "seconds": times(samples),
    }
    value = {f"{name}_over_predicted": ratio["wall"]["median"] / predicted for name, ratio in ratios.items()}
    target = dict.fromkeys(value, SLACK)
    return finish("prefill_ratio", args, target=target, value=value, figures=figures, device=model.device)


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, pairs=20)
    parser.add_argument("--plan", default=PRUNED, help="the pruned plan (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: %(default)s)")
    return parser.parse_args()


def prefill(model: Any, ids: torch.Tensor, placed: Callable[[], AbstractContextManager[Any]]) -> Callable[[], Timed]:
    """One timed prefill of `ids` [1, length]; entering the plan is not part of the time."""
    step = Stepper(model)

    def work() -> Timed:
        with torch.no_grad(), placed():
            return timed(lambda: step(ids), ids.device)

    return work


def predicted_ratio(plan: Plan, spec: Spec, prompt: int) -> float:
    """Prefill FLOPs of the plan over those of the dense model."""
    shape = Shape(batch=1, prompt=prompt, context=prompt)
    return cost(plan, spec, shape).prefill_flops / cost(Plan.identity(spec), spec, shape).prefill_flops


if __name__ == "__main__":
    sys.exit(main())
