"""What the executor costs while decoding: the identity plan run live against the stock model, token by token.

Target: the identity plan costs at most 2 % of the decode time of the stock model, by the wall clock.
Reported without a target: a 24-layer plan live against the stock model rewritten from it; the same two in a model
so narrow that the executor's microseconds per layer stand out; what entering and leaving a plan costs.
Each pair decodes the same tokens from the same cache length, one token unmeasured and then a few measured.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from _common import PRUNED, Timed, compared, finish, opened, options, paired, say, spread, timed, times
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.evaluation.decoding import Stepper, random_tokens
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.plan import Plan, parse_plan
from shoal.writing.surgery import rewrite

TARGET = {"identity_overhead": 0.02}
CLOSE = 1e-3


class Decoding:
    """One way to decode: `model`, under `plan` when there is one, from a cache that `context` tokens have filled."""

    def __init__(self, model: Any, plan: Plan | None, context: int, tokens: int) -> None:
        self.model, self.plan, self.context, self.tokens = model, plan, context, tokens
        self.ids = random_tokens(model, 1, context + tokens + 1, seed=0)
        self.step = Stepper(model)
        with torch.no_grad(), self.placed():
            self.cache = self.step(self.ids[:, :context])

    def placed(self) -> Any:
        """The plan at work for the time of a `with`."""
        return nullcontext() if self.plan is None else running(self.model, self.plan)

    def __call__(self) -> Timed:
        with torch.no_grad(), self.placed():
            cache = copy.deepcopy(self.cache)
            self._decode(cache, 0, 1)  # entering a plan leaves the processor's caches with other things in them
            return timed(lambda: self._decode(cache, 1, 1 + self.tokens), self.ids.device)

    def _decode(self, cache: Any, start: int, end: int) -> None:
        for position in range(self.context + start, self.context + end):
            self.step(self.ids[:, position : position + 1], position, cache)

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """What it computes for the whole context, [1, context, vocab]."""
        with self.placed():
            logits: torch.Tensor = self.model(input_ids=self.ids[:, : self.context], use_cache=False).logits
        return logits


def main() -> int:
    """Measure and print; the exit status says whether the target was met."""
    args = _arguments()
    model = opened(args).model
    spec = inspect(model)
    identity = Plan.identity(spec)
    pruned = parse_plan(args.plan, identity)
    say(f"{args.model}: {spec.stack().depth} layers, context {args.context}")
    whole, live = _compare(model, identity, args, "identity"), _compare(model, pruned, args, "pruned")
    narrow = narrow_model(spec.stack().depth)
    say("narrow model")
    figures = {
        "identity_against_stock": whole,
        "live_against_rewritten": live | {"plan": str(pruned)},
        "narrow": {
            "hidden": narrow.config.hidden_size,
            "identity_against_stock": _compare(narrow, Plan.identity(inspect(narrow)), args, "narrow identity"),
            "live_against_rewritten": _compare(
                narrow, parse_plan(args.plan, Plan.identity(inspect(narrow))), args, "narrow pruned"
            ),
        },
        "entering_and_leaving_ms": entry(model, pruned),
    }
    value = {"identity_overhead": whole["ratio"]["wall"]["median"] - 1}
    return finish("executor_overhead", args, target=TARGET, value=value, figures=figures, device=model.device)


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, pairs=100)
    parser.add_argument("--plan", default=PRUNED, help="the pruned plan (default: %(default)s)")
    parser.add_argument("--context", type=int, default=128, help="cache length at the start (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=3, help="tokens timed in each half of a pair (default: 3)")
    return parser.parse_args()


def _compare(model: Any, plan: Plan, args: argparse.Namespace, what: str) -> dict[str, Any]:
    """`plan` live against the stock model that computes the same: the identity's is the model itself."""
    other = model if plan.is_identity() else rewrite(model, plan).eval()
    stock, live = (Decoding(m, p, args.context, args.tokens) for m, p in ((other, None), (model, plan)))
    _same(stock, live, exact=plan.is_identity())
    samples = paired({"stock": stock, "live": live}, args.pairs, what=f"{what} pair")
    layers = len(plan.layers())
    return {
        "ratio": compared(samples, "live", "stock"),
        "seconds_per_token": times(samples, args.tokens),
        "microseconds_per_layer": {
            clock: spread(
                [
                    1e6 * (a[place] - b[place]) / args.tokens / layers
                    for a, b in zip(samples["live"], samples["stock"], strict=True)
                ]
            )
            for place, clock in enumerate(("wall", "cpu"))
        },
    }


def _same(stock: Decoding, live: Decoding, *, exact: bool) -> None:
    """A fast wrong result is none: stop when the two sides do not compute the same."""
    error = (stock.logits() - live.logits()).abs().max().item()
    if not error <= (0 if exact else CLOSE):
        sys.exit(f"the live plan and the stock model differ by {error:.1e}, so their times cannot be compared")


def narrow_model(depth: int) -> Any:
    """A random model of `depth` layers in which a layer's arithmetic takes next to no time."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", num_hidden_layers=depth, **sizes, **heads)
    ).eval()


def entry(model: Any, plan: Plan, repeats: int = 30) -> dict[str, float]:
    """Milliseconds to put `plan` on a model that was probed before, and to take it away."""

    def once() -> None:
        with running(model, plan):
            pass

    return spread([1e3 * _seconds(once) for _ in range(repeats)])


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
