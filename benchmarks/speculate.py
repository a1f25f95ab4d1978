"""Self-speculation against `assistant_early_exit` of transformers, and against plain decoding.

1. Same exit layer, same most drafted tokens, in turn, each side with its own rule for ending a draft (ours also for
   leaving it out). Target: at most 1/1.3 of the stock's time, and the text of plain decoding. Beside it, without a
   target, both draft as many tokens every time, at this exit and a later one: sharing alone makes that difference.
2. The best draft that the tuner finds against plain `generate` on three kinds of prompt, with its verdict. No target:
   whether a draft pays is a property of the model, the text and the machine.
3. Families in which the stock raises: ours writes the text of plain decoding.
4. With --shape: the times of a model of that shape with random weights in the same dtype, and what the drafts of
   --model would be worth there if as many were accepted (an exit at the same share of the depth).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from _common import compared, finish, opened, options, paired, say, timed, times
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from shoal.api.prompts import BUILTIN, encoded
from shoal.api.speculate import tune_draft
from shoal.decoding.arguments import GREEDY
from shoal.models.stacks import find_stack
from shoal.plan import Run
from shoal.speculating.drafts.lookup import lookup
from shoal.speculating.forecast import DraftSetting, Forecast, SampleText, predict_speed
from shoal.speculating.speculator import Speculator

TARGET = {"time_ratio": 1 / 1.3, "different_texts": 0}
SHAPES = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24},
}
"""Those of Llama 3.2; both have 8 key and value heads and an mlp of 8192."""


def main() -> int:
    """Measure and print; the exit status says whether the target was met."""
    args = _arguments()
    loaded = opened(args)
    value: dict[str, float] = {}
    figures: dict[str, Any] = {"stock": [], "stock_raises": _where_the_stock_raises()}
    for layer, stop in ((args.exit, True), (args.exit, False), (args.late_exit, False)):
        found, stock = _against_stock(loaded, args, layer, stop)
        figures["stock"].append(stock)
        value = value or found
        value["different_texts"] = max(value["different_texts"], found["different_texts"])
    if not args.no_tune:
        figures["tuned"] = {kind: _tuned(loaded, kind, args) for kind in BUILTIN}
    if args.shape:
        figures["shape"] = _of_shape(loaded, args)
    return finish("speculate", args, target=TARGET, value=value, figures=figures, device=loaded.model.device)


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, pairs=2)
    parser.add_argument(
        "--exit", type=int, default=8, help="layers that draft against the stock (default: %(default)s)"
    )
    parser.add_argument("--late-exit", type=int, default=20, help="a second exit (default: %(default)s)")
    parser.add_argument("--length", type=int, default=4, help="drafted tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=24, help="tokens for each prompt (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, help="time a model of this shape, too")
    parser.add_argument("--no-tune", action="store_true", help="leave the tuner out")
    return parser.parse_args()


def _against_stock(
    loaded: Any, args: argparse.Namespace, layer: int, stop: bool
) -> tuple[dict[str, float], dict[str, Any]]:
    """`stop`: each side ends and leaves out drafts by its own rule; otherwise both draft --length tokens every time."""
    model, device = loaded.model, loaded.model.device
    texts_asked = [kind[0] for kind in BUILTIN.values()][: 3 if stop else 1]
    tasks = [encoded(loaded, text, None) for text in texts_asked]
    speculator = Speculator(model, f"exit:{layer}", length=args.length, confidence="auto" if stop else None)
    sides: dict[str, Any] = {
        "plain": model.generate,
        "ours": speculator.generate,
        "stock": partial(model.generate, assistant_early_exit=layer),
    }

    def written(name: str) -> list[torch.Tensor]:
        return [sides[name](**task, **GREEDY, max_new_tokens=args.new) for task in tasks]

    texts, passes = {}, {}
    with _stock_settings(model, args.length, stop):
        for name in sides:
            with _layers(model) as seen:
                texts[name] = written(name)
            passes[name] = sum(seen.values())
        rounds = {name: partial(timed, partial(written, name), device) for name in sides}
        samples = paired(rounds, args.pairs, warmup=0, what=f"exit {layer}: round")
    prompts = sum(task["input_ids"].shape[1] for task in tasks)
    tokens = sum(text.shape[1] for text in texts["plain"]) - prompts
    ratio = compared(samples, "ours", "stock")
    different = sum(not torch.equal(a, b) for a, b in zip(texts["plain"], texts["ours"], strict=True))
    return {"time_ratio": ratio["wall"]["median"], "different_texts": different}, {
        "exit": layer, "length": args.length, "own_stops": stop, "tokens": tokens, "time_ratio": ratio,
        "time_ratio_to_plain": compared(samples, "ours", "plain"),
        "seconds_per_token": times(samples, tokens),
        "layer_passes_per_token_with_prompt": {name: n / tokens for name, n in passes.items()},
        "last_text": speculator.stats.to_dict(),
    }  # fmt: skip


@contextmanager
def _stock_settings(model: Any, length: int, stop: bool) -> Iterator[None]:
    """The stock drafts at most `length` tokens, with `stop` fewer below its default confidence of 0.4."""
    config = model.generation_config
    names = {
        "num_assistant_tokens": length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.4 if stop else 0.0,
    }
    before = {name: getattr(config, name, None) for name in names}
    for name, value in names.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def _layers(model: Any) -> Iterator[Counter[int]]:
    """Tokens through each layer, by hooks; the prompt's included."""
    seen: Counter[int] = Counter()
    layers = list(find_stack(model).layers)

    def hook(index: int) -> Any:
        return lambda _, __, out: seen.update({index: (out[0] if isinstance(out, tuple) else out).shape[-2]})

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tuned(loaded: Any, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    say(f"tuning on {kind}")
    found = tune_draft(loaded, BUILTIN[kind], new=args.new, finalists=2, pairs=args.pairs).to_dict()
    return found | {"foreseen": found["foreseen"][:5]}


def _where_the_stock_raises() -> dict[str, Any]:
    shared = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    small = {
        "gpt2": GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=64, **shared),
        "opt": OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=4, num_attention_heads=4,
                         word_embed_proj_dim=32, max_position_embeddings=64, **shared),
    }  # fmt: skip
    out: dict[str, Any] = {}
    for name, config in small.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        ids = torch.arange(3, 13)[None]
        asked = GREEDY | {"max_new_tokens": 16, "attention_mask": torch.ones_like(ids)}
        ours = torch.equal(Speculator(model, "exit:2").generate(ids, **asked), model.generate(ids, **asked))
        try:
            model.generate(ids, assistant_early_exit=2, **asked)
            stock = "ran"
        except Exception as error:
            stock = type(error).__name__
        out[name] = {"ours_identical": ours, "stock": stock}
    return out


def _of_shape(loaded: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Times from a large model of random weights, hits from the real small one."""
    small = loaded.model
    told = []
    for texts in BUILTIN.values():
        task = encoded(loaded, texts[1], None)
        told.append(SampleText(small.generate(**task, **GREEDY, max_new_tokens=args.new), task["input_ids"].shape[1]))
    device = small.device
    dtype = small.dtype
    config = LlamaConfig(vocab_size=small.config.vocab_size, max_position_embeddings=4096, num_key_value_heads=8,
                         intermediate_size=8192, **SHAPES[args.shape])  # fmt: skip
    say(f"building {args.shape} on {device} in {dtype}")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            large = AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)
    rows = []
    one, two = Speculator(small, "lookup").runner, Speculator(large, "lookup").runner
    with torch.no_grad(), one, two:
        near, far = Forecast(one, told), Forecast(two, told)
        passes = far.time_base()
        for eighth in range(1, 8):
            here, there = (tuple(Run(i) for i in range(max(1, round(s.depth * eighth / 8)))) for s in (one, two))
            hits, cost = near.hits(here), far.time_draft(there)
            for length in (1, 2, 4, 8):
                seconds, accepted, tokens = predict_speed(
                    DraftSetting(there, None, length), told, hits, passes, cost, len(there), two.depth
                )
                rows.append({"draft": f"exit:{len(there)}", "length": length, "acceptance": accepted,
                             "tokens_per_round": tokens, "speedup": passes.full[1] / seconds})  # fmt: skip
        finder = lookup(spec=one.spec)
        for length in (2, 4, 8):
            setting = DraftSetting((), finder, length)
            seconds, accepted, tokens = predict_speed(setting, told, None, passes, 0.0, 0, two.depth)
            rows.append({"draft": "lookup", "length": length, "acceptance": accepted, "tokens_per_round": tokens,
                         "speedup": passes.full[1] / seconds})  # fmt: skip
    return {
        "shape": args.shape, "dtype": str(dtype), "device": str(device), "depth": config.num_hidden_layers,
        "simulated": "times of random weights, acceptance of the small model",
        "pass_ms": {n: 1000 * s for n, s in passes.full.items()},
        "head_ms": {n: 1000 * s for n, s in passes.head.items()},
        "drafts": sorted(rows, key=lambda row: -row["speedup"])[:8],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
