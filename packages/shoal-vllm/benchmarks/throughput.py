"""Tokens per second of a planned folder under vLLM beside a stock checkpoint of the same layers, paired in one process.

Three engines answer the same prompts in each round, in another order each time: the planned folder by the plugin, the
stock checkpoint by vLLM's Transformers backend (model_impl="transformers"), and the same by vLLM's own model class.
Target: the planned folder makes at least 0.97 of the tokens per second of the Transformers backend, in the median of
the rounds.

    shoal write smollm2 --plan 0-20,25-29 --as planned --output PLANNED
    shoal write smollm2 --plan 0-20,25-29 --output STOCK
    python packages/shoal-vllm/benchmarks/throughput.py PLANNED STOCK
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

from shoal_vllm.greedy import SETTINGS

TARGET = 0.97


def main() -> int:
    """Print the medians as one JSON object; the exit status says whether the target was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("planned", help="the planned folder")
    parser.add_argument("stock", help="a stock checkpoint of the same layers")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--prompts", type=int, default=4, help="at once (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens written behind each (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--compiled", action="store_true", help="compiled instead of eager")
    args = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams, __version__

    given: dict[str, Any] = {
        "dtype": args.dtype, "enforce_eager": not args.compiled, "max_model_len": args.prompt + args.new,
        "max_num_seqs": args.prompts, "enable_prefix_caching": False, "skip_tokenizer_init": True,
    }  # fmt: skip
    engines = {
        "planned": LLM(model=args.planned, **given),
        "transformers": LLM(model=args.stock, model_impl="transformers", **given),
        "native": LLM(model=args.stock, **given),
    }
    asked = SamplingParams(temperature=0, max_tokens=args.new, detokenize=False, ignore_eos=True)
    prompts = [
        {"prompt_token_ids": [(7 * i + 3 * j * j + 11) % 300 + 10 for j in range(args.prompt)]}
        for i in range(args.prompts)
    ]
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    texts: dict[str, Any] = {}
    names = list(engines)
    for turn in range(args.rounds + 1):  # the first one warms up
        for name in names[turn % 3 :] + names[: turn % 3]:
            start = time.perf_counter()
            outs = engines[name].generate(prompts, asked, use_tqdm=False)
            taken = time.perf_counter() - start
            texts[name] = [list(one.outputs[0].token_ids) for one in outs]
            if turn:
                speeds[name].append(sum(map(len, texts[name])) / taken)
    ratios = {
        other: [mine / its for mine, its in zip(speeds["planned"], speeds[other], strict=True)] for other in names[1:]
    }
    said = {
        "engine": f"vllm {__version__}", "settings": vars(args), "target": TARGET,
        "tokens_per_second": {name: statistics.median(found) for name, found in speeds.items()},
        "ratio": {
            name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
            for name, found in ratios.items()
        },
        "same_tokens_as_transformers": texts["planned"] == texts["transformers"],
    }  # fmt: skip
    sys.stdout.write(json.dumps(said, indent=2) + "\n")
    return 0 if said["ratio"]["transformers"]["median"] >= TARGET else 1


if __name__ == "__main__":
    raise SystemExit(main())
