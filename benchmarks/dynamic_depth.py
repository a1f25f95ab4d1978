"""What the KV fills cost in quality and what policies cost in time, on SmolLM2; prints JSON.

`python -m benchmarks.dynamic_depth`. Quality: teacher-forced, 64 columns of each window are the prompt; KL(dense ||
policy) and top-1 agreement over the tokens that ran every layer, so that what differs comes from the KV of earlier
tokens alone. Time: that of a decoded token on the built-in prompts, without and with the policy in turn, as `shoal
bench --policy` tells it.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

import shoal
from shoal.api.bench_policy import bench_policy
from shoal.evaluation.agreement import compare_logits
from shoal.live import running

FILLS = (
    "exit:confidence=0.9,first=15,every=5,fill=project",
    "exit:confidence=0.9,first=15,every=5,fill=copy",
    "exit:confidence=0.9,first=15,every=5,fill=mask",
    "exit:confidence=0.9,first=15,every=5,fill=defer",
    "menu:plans=0-29+0-9,13-29+0-17,22-29,choose=turn,fill=project",
    "menu:plans=0-29+0-9,13-29+0-17,22-29,choose=turn,fill=copy",
    "menu:plans=0-29+0-9,13-29+0-17,22-29,choose=turn,fill=mask",
)
TIMED = (
    "exit:after=19",
    "exit:after=19,fill=mask",
    "exit:after=19,fill=defer",
    "exit:confidence=0.9,first=15,every=5",
    "exit:confidence=0.99,first=15,by=saturation",
    "unified:speedup=1.5",
    "skip:late=10,phase=decode",
    "per-prompt:skip=10",
    "ffn-skip:threshold=0.9",
)


@torch.no_grad()
def quality(loaded: Any, data: Any, prompt: int = 64) -> dict[str, Any]:
    """For each policy: KL in nats per token and agreement where all layers ran, and over all generated tokens."""
    model, found = loaded.model, {}
    depth = model.config.num_hidden_layers
    for policy in FILLS:
        sums = {"kl": 0.0, "same": 0, "whole": 0, "kl_all": 0.0, "same_all": 0, "tokens": 0, "depth": 0.0}
        for ids, _ in data.batches(1):
            dense = model(input_ids=ids, use_cache=False).logits
            with running(model, shoal.Plan.identity(shoal.inspect(model)), policy=policy) as handle:
                handle.prompt = prompt
                logits = model(input_ids=ids, use_cache=False).logits
                deep = torch.tensor(handle.trace.depths[0][prompt:])
            kl, same = (one[0, prompt:] for one in compare_logits(dense, logits))
            whole = deep >= (depth if policy.startswith("exit") else 0)
            sums["kl"] += float(kl[whole].sum())
            sums["same"] += int(same[whole].sum())
            sums["whole"] += int(whole.sum())
            sums["kl_all"] += float(kl.sum())
            sums["same_all"] += int(same.sum())
            sums["tokens"] += len(deep)
            sums["depth"] += float(deep.sum())
        found[policy] = {
            "mean_depth": sums["depth"] / sums["tokens"],
            "whole_tokens": sums["whole"],
            "kl_whole": sums["kl"] / sums["whole"],
            "agreement_whole": sums["same"] / sums["whole"],
            "kl": sums["kl_all"] / sums["tokens"],
            "agreement": sums["same_all"] / sums["tokens"],
            "tokens": sums["tokens"],
        }
        print(policy, found[policy], file=sys.stderr)
    return found


def speed(loaded: Any, new: int, pairs: int) -> dict[str, Any]:
    """For each policy what `shoal bench --policy` finds on the built-in prompts."""
    found = {}
    for policy in TIMED:
        found[policy] = bench_policy(loaded, policy, new=new, pairs=pairs).to_dict()
        print(policy, found[policy]["ratio"], file=sys.stderr)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", choices=["quality", "speed"], help="Half of it.")
    options = parser.parse_args()
    loaded = shoal.load("smollm2")
    loaded.model.eval()
    data = shoal.load_data("builtin", loaded.tokenizer, split="test", length=options.length, limit=options.windows)
    found = {}
    if options.only != "speed":
        found["quality"] = quality(loaded, data)
    if options.only != "quality":
        found["speed"] = speed(loaded, options.new_tokens, options.pairs)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
