"""What exact graph fusion does to a decoded token, and whether the bytes that a plan moves predict its time.

All variants decode the same random tokens in turn: dense, with `siblings`, with `norms`, with both, under a plan with
one mlp for all layers, under one with half of the layers, and the compiled step of neither. Beside each plan stands
what its byte count predicts: bytes from memory over this machine's bandwidth plus one overhead a part, which the dense
step alone is fitted to. A second part compiles a stack of small layers at several depths, as it is and as `stack`.
No target: what is slower is shown slower.
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
from _common import Timed, compared, finish, opened, options, paired, say, times
from transformers import AutoModelForCausalLM, LlamaConfig

from shoal.evaluation.decoding import Stepper, random_tokens
from shoal.evaluation.step_time import StepTime, bandwidth, step_time_of
from shoal.executing.timing import synchronized_time
from shoal.graphs import fused
from shoal.live import running
from shoal.models.evaluating import evaluating
from shoal.models.inspect import inspect
from shoal.plan import Shape, parse_plan
from shoal.plan.plan import Plan

GRAPHS: dict[str, tuple[str, ...]] = {"siblings": ("siblings",), "norms": ("norms",), "both": ("norms", "siblings")}
Side = Callable[[], AbstractContextManager[Any]]


def main() -> int:
    """Time all variants and print."""
    args = _arguments()
    figures: dict[str, Any] = {"compile": _compiling(args.depths, args.backend) if args.depths else None}
    device = torch.device("cpu")
    if not args.compile_only:
        model = opened(args).model
        device = model.device
        figures |= _decoding(model, args)
    return finish("graphs", args, target={}, value={}, figures=figures, device=device)


def _decoding(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    spec = inspect(model)
    depth = spec.stack("decoder").depth
    texts = {
        "one mlp for all": ",".join(f"{i}a,0m" for i in range(depth)),
        "one layer for all": f"0x{depth}",
        "half of the layers": f"0-{depth // 2 - 1}",
        "every second kv": ",".join(f"{i}" if i % 2 == 0 else f"{i}@{i - 1}" for i in range(depth)),
    }
    wanted = {name for name in (*texts, *GRAPHS) if not args.only or name in args.only}
    plans = {name: parse_plan(text, Plan.identity(spec)) for name, text in texts.items() if name in wanted}
    ids = random_tokens(model, 1, args.prompt + args.new, seed=0)
    said: dict[str, str] = {}
    sides: dict[str, Side] = {"dense": nullcontext}
    sides |= {name: partial(running, model, plan) for name, plan in plans.items()}
    variants: dict[str, Callable[[], Timed]] = {
        name: partial(_steps, model, side, ids, args) for name, side in sides.items()
    }
    for name, graphs in GRAPHS.items():
        if name not in wanted:
            continue
        with fused(model, *graphs) as handle:
            said[name] = handle.describe()
        variants[name] = partial(_steps, model, partial(fused, model, *graphs), ids, args)
        say(said[name])
    with evaluating(model):
        samples = paired(variants, args.pairs)
    seconds = times(samples)
    rates = bandwidth(model.device, model.dtype, spec.stack("decoder").hidden)
    shape = Shape(1, args.prompt, args.prompt + args.new // 2)
    dtype = str(model.dtype).removeprefix("torch.")
    predicted = step_time_of(rates, seconds["dense"]["wall"]["median"], spec, shape, dtype)
    return {
        "seconds_per_token": seconds,
        "over_dense": {name: compared(samples, name, "dense") for name in variants if name != "dense"},
        "bandwidth": rates.to_dict(),
        "overhead_of_a_part": predicted.per_part,
        "plans": {name: _row(predicted, plan) for name, plan in {"dense": Plan.identity(spec), **plans}.items()},
        "graphs": said,
    }


def _row(predicted: StepTime, plan: Plan) -> dict[str, Any]:
    found = predicted.moved(plan)
    shares = {"predicted_share": predicted.without_cache().share(plan), "if_cached": predicted.share(plan)}
    return {"plan": str(plan), "moved": found.to_dict(), **shares}


def _steps(model: Any, side: Side, ids: torch.Tensor, args: argparse.Namespace) -> Timed:
    """Seconds of a decoded token behind the prompt, whose pass does not count."""
    step = Stepper(model)
    with side(), torch.no_grad():
        cache = step(ids[:, : args.prompt])
        wall, cpu = synchronized_time(ids.device), time.process_time()
        for at in range(args.prompt, args.prompt + args.new):
            cache = step(ids[:, at : at + 1], at, cache)
        wall, cpu = synchronized_time(ids.device) - wall, time.process_time() - cpu
    return wall / args.new, cpu / args.new


def _compiling(depths: list[int], backend: str) -> dict[str, Any]:
    """Seconds of the first compiled pass without a cache, by depth, as it is and as `stack`; then of a later pass."""
    found: dict[str, Any] = {}
    for depth in depths:
        for name, graphs in (("as it is", ()), ("stack", ("stack",))):
            torch._dynamo.reset()
            model, ids = _small(depth), torch.arange(1, 17)[None]
            with torch.no_grad(), fused(model, *graphs) if graphs else nullcontext():
                want = model(ids, use_cache=False).logits
                work = partial(torch.compile(model, backend=backend, dynamic=False), ids, use_cache=False)
                first = _seconds(work)
                later = min(_seconds(work) for _ in range(5))
                far = float((work().logits - want).abs().max() / want.abs().max())
            found[f"{name}, {depth} layers"] = {"first": first, "later": later, "difference": far}
            say(f"compile {name}, {depth} layers: {first:.1f} s, then {1000 * later:.1f} ms, logits within {far:.1e}")
    return found


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _small(depth: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=depth, num_attention_heads=4, vocab_size=512
    )
    return AutoModelForCausalLM.from_config(config).eval()


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, pairs=10)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=8, help="tokens to decode in a round (default: %(default)s)")
    parser.add_argument("--only", action="append", help="a variant beside the dense one; again for more (default: all)")
    parser.add_argument("--depths", type=int, nargs="*", default=[], help="compile models of these depths, too: 2 8 30")
    parser.add_argument("--compile-only", action="store_true", help="time compiling alone")
    parser.add_argument("--backend", default="inductor", help="torch.compile's (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
