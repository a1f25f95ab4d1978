"""What the fast path makes of a decoded token: stock `generate`, a bare loop, the thin loop, the compiled step.

All variants decode the same prompt greedily in turn, dense and under a plan; a token's time is the time between two
calls of a streamer, so the prompt is not in it (the bare loop has none and is timed as a whole after its prompt).
Target: the compiled path takes at most 1/1.3 of stock `generate`'s time for a token. Told beside it: what compiling
took, and after how many tokens it is paid back.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from _common import PRUNED, Timed, compared, finish, opened, options, paired, say, times
from transformers import AutoModelForCausalLM, LlamaConfig

from shoal.decoding.arguments import GREEDY
from shoal.decoding.fast import FastDecoder
from shoal.evaluation.decoding import Stepper, random_tokens
from shoal.evaluation.token_clock import TokenClock
from shoal.executing.timing import synchronized_time
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.models.inspect import inspect
from shoal.plan import Plan, drop, parse_plan

TARGET = {"dense_ratio": 1 / 1.3}

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
"""Llamas of random weights, to time where no checkpoint is at hand; 8 heads of keys and values, 128,256 tokens."""


def main() -> int:
    """Time all variants and print; the exit status says whether the target was met."""
    args = _arguments()
    model = _model(args)
    plan = _plan(model, args)
    say(f"{args.shape or args.model} on {model.device}, {model.dtype}; the plan is {plan}")
    ids = random_tokens(model, args.batch, args.prompt, seed=0)
    dense, planned = FastDecoder(model, mode=args.mode), FastDecoder(model, plan, mode=args.mode)
    thin = {None: FastDecoder(model, mode="off"), plan: FastDecoder(model, plan, mode="off")}
    variants: dict[str, Callable[[], Timed]] = {}
    for name, own, fast in (("dense", None, dense), ("plan", plan, planned)):
        live = nullcontext if own is None else partial(running, model, own)
        variants[f"{name} stock"] = partial(_generated, model.generate, live, ids, args.new)
        variants[f"{name} bare"] = partial(_bare, model, live, ids, args.new)
        variants[f"{name} thin"] = partial(_generated, thin[own].generate, nullcontext, ids, args.new)
        variants[f"{name} fast"] = partial(_generated, fast.generate, nullcontext, ids, args.new)
    with evaluating(model):
        same = {
            "dense": _same(model, nullcontext, dense, ids, args.new),
            "plan": _same(model, partial(running, model, plan), planned, ids, args.new),
        }
        samples = paired(variants, args.pairs)
    against = {name: compared(samples, f"{name} fast", f"{name} stock") for name in ("dense", "plan")}
    token = times(samples)
    figures = {
        "plan": str(plan),
        "seconds_per_token": token,
        "fast_over_stock": against,
        "thin_over_stock": {name: compared(samples, f"{name} thin", f"{name} stock") for name in ("dense", "plan")},
        "stock_over_bare": {name: compared(samples, f"{name} stock", f"{name} bare") for name in ("dense", "plan")},
        "plan_over_dense": {
            kind: compared(samples, f"plan {kind}", f"dense {kind}") for kind in ("stock", "bare", "thin", "fast")
        },
        "same_tokens_as_generate": same,
        "mode": dense.mode,
        "why_not_compiled": dense.why_off,
        "compiled": [vars(one) for fast in (dense, planned) for one in fast.compiled.values()],
        "paid_back_after_tokens": {
            name: _paid_back(fast, token, name) for name, fast in (("dense", dense), ("plan", planned))
        },
    }
    value = {"dense_ratio": against["dense"]["wall"]["median"]}
    return finish("decode", args, target=TARGET, value=value, figures=figures, device=model.device)


def _generated(generate: Callable[..., Any], live: Callable[[], Any], ids: torch.Tensor, new: int) -> Timed:
    clock = TokenClock(ids.device)
    with live():
        generate(ids, **_greedy(ids, new), streamer=clock if ids.shape[0] == 1 else None)
    wall, cpu = clock.seconds
    return wall / (new - 1), cpu / (new - 1)


def _bare(model: Any, live: Callable[[], AbstractContextManager[Any]], ids: torch.Tensor, new: int) -> Timed:
    step, length = Stepper(model), ids.shape[1]
    with live(), torch.no_grad():
        cache = step(ids)
        start = _now(ids.device)
        for position in range(length, length + new - 1):
            cache = step(ids[:, -1:], position, cache)
        end = _now(ids.device)
    return (end[0] - start[0]) / (new - 1), (end[1] - start[1]) / (new - 1)


def _now(device: torch.device) -> Timed:
    return synchronized_time(device), time.process_time()


def _greedy(ids: torch.Tensor, new: int) -> dict[str, Any]:
    return GREEDY | {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "min_new_tokens": new}


def _same(model: Any, live: Callable[[], Any], fast: FastDecoder, ids: torch.Tensor, new: int) -> bool:
    """Whether the compiled path gives the tokens of `generate`; this compiles it too."""
    with live():
        want = model.generate(ids, **_greedy(ids, new))
    return torch.equal(fast.generate(ids, **_greedy(ids, new)), want)


def _paid_back(fast: FastDecoder, token: dict[str, Any], name: str) -> int | None:
    """Tokens after which compiling is paid back; None when it never is, or when nothing was compiled."""
    saved = token[f"{name} stock"]["wall"]["median"] - token[f"{name} fast"]["wall"]["median"]
    seconds = sum(one.seconds for one in fast.compiled.values())
    return round(seconds / saved) if saved > 0 and seconds > 0 else None


def _model(args: argparse.Namespace) -> Any:
    if args.shape is None:
        return opened(args).model
    torch.set_num_threads(args.threads)
    config = LlamaConfig(**SHAPES[args.shape], num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True)
    device = args.device or (torch.accelerator.current_accelerator() or torch.device("cpu"))
    with torch.device(device):
        torch.manual_seed(0)
        dtype = "bfloat16" if args.dtype in (None, "auto") else args.dtype
        made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return made.eval()


def _plan(model: Any, args: argparse.Namespace) -> Plan:
    spec = inspect(model)
    if args.plan is not None or args.shape is None:
        return parse_plan(args.plan or PRUNED, Plan.identity(spec))
    depth = model.config.num_hidden_layers
    return drop(Plan.identity(spec), range(depth // 2, depth // 2 + depth // 5))


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, pairs=5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode (default: %(default)s)")
    parser.add_argument("--plan", help=f"depth notation (default: {PRUNED}, with --shape a fifth less)")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="random weights of this shape instead of --model")
    parser.add_argument("--mode", default="auto", help="auto, layers, step or off (default: %(default)s)")
    args = parser.parse_args()
    args.batch = 1  # a streamer takes one sequence
    return args


if __name__ == "__main__":
    sys.exit(main())
