"""A checkpoint measured, pruned, healed at the cut, evaluated and written by --stream: the peak memory of each step.

A Llama-shaped checkpoint of random bfloat16 numbers is made in a temporary folder, in shards of 1 GB. Then, each in a
fresh process that takes the layers from the files:

* `measure`: block influence on --sequences windows of --length random tokens;
* `prune`: shortgpt, so that --drop layers go;
* `evaluate`: perplexity and KL of the plan beside the whole model, on the same windows;
* `heal`: the layer before each cut trained on the dense states behind it (streamline:kind=layer, one epoch: a step for
  each window that is not held back), and the result written from file to file, with its proof;
* `write`: the plan without healing, written and proved.

Target: the peak resident memory of every process, libraries included, at most --limit GiB. The result is one JSON
object on stdout.

    python benchmarks/larger_than_memory.py --gigabytes 14 --shape 7b --folder /path/with/room
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _checkpoint import SHAPES, make
from out_of_core import watch

STEPS = ("measure", "prune", "evaluate", "heal", "write")
VOCABULARY = 32_000


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b", help="of a layer (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=16, help="windows (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens in a window (default: %(default)s)")
    parser.add_argument("--drop", type=int, default=4, help="layers that go (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=8, help="GiB that no process may pass (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--child", nargs=2, metavar=("STEP", "ROOT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    return child(args, args.child[0], Path(args.child[1])) if args.child else measure(args)


def measure(args: argparse.Namespace) -> int:
    from shoal.record import environment

    size = int(args.gigabytes * 1e9)
    with tempfile.TemporaryDirectory(prefix="shoal-larger-than-memory-", dir=args.folder) as name:
        root = Path(name)
        free = shutil.disk_usage(root).free
        if free < 2.2 * size:
            print(f"{root} has {free / 1e9:.1f} GB free and {2.2 * size / 1e9:.1f} GB are needed", file=sys.stderr)
            return 2
        layers = make(root / "base", size, shape=args.shape, finite=True)
        stored = sum(file.stat().st_size for file in (root / "base").glob("*.safetensors"))
        steps: dict[str, dict[str, Any]] = {}
        for step in STEPS:
            steps[step] = watch([sys.executable, __file__, "--child", step, str(root), *options(args)])
            steps[step]["said"] = json.loads((root / f"{step}.json").read_text())
            print(f"{step}: {steps[step]}", file=sys.stderr, flush=True)
            shutil.rmtree(root / "out", ignore_errors=True)
    peak = max(found["peak_rss_bytes"] for found in steps.values())
    limit = int(args.limit * 2**30)
    print(json.dumps({
        "benchmark": "larger_than_memory", "target": {"peak_rss_bytes": limit}, "value": {"peak_rss_bytes": peak},
        "passed": peak <= limit, "missed": [name for name, s in steps.items() if s["peak_rss_bytes"] > limit],
        "figures": {"layers": layers, "bytes": stored, "steps": steps},
        "settings": {"shape": args.shape, **{key: getattr(args, key) for key in ("sequences", "length", "drop")}},
        "environment": environment(),
    }, indent=2))  # fmt: skip
    return 0 if peak <= limit else 1


def options(args: argparse.Namespace) -> list[str]:
    return [word for name in ("sequences", "length", "drop") for word in (f"--{name}", str(getattr(args, name)))]


def child(args: argparse.Namespace, step: str, root: Path) -> int:
    """One step in this process; what it found goes to STEP.json."""
    import torch

    import shoal
    from shoal.api.publish import publish
    from shoal.data import Data
    from shoal.data.info import DataInfo
    from shoal.models.compat import hide_own_bars

    hide_own_bars()
    ids = torch.randint(VOCABULARY, (args.sequences, args.length), generator=torch.Generator().manual_seed(0))
    data = Data(ids, None, DataInfo("random", "whole", args.length, args.sequences, args.length, "none", 0, "0"))
    start = time.perf_counter()
    loaded = shoal.load(root / "base", stream=True)
    loading = time.perf_counter() - start
    said: dict[str, Any]
    match step:
        case "measure":
            scores = shoal.measure(loaded, data=data)
            said = {"lowest first": scores.order()}
        case "prune":
            said = {"plan": str(shoal.prune(loaded, drop=args.drop, data=data).plan)}
        case "evaluate":
            found = shoal.evaluate(loaded, plan=plan_of(root), data=data, generation=False)
            assert found.agreement is not None
            said = {"nats": found.perplexity.nll, "kl": found.agreement.kl}
        case "heal" | "write":
            then = ["streamline:kind=layer,epochs=1"] if step == "heal" else []
            made = shoal.prune(loaded, plan=plan_of(root), data=data, then=then, assess=False)
            written = publish(made, root / "out")
            said = {"plan": str(made.plan), "proved": written.proof.passed, "bytes": written.bytes}
            said |= {"fits": made.then[0]["fits"]} if then else {}
        case _:
            raise SystemExit(f"there is no step {step}")
    (root / f"{step}.json").write_text(json.dumps(said))
    print(json.dumps({"load_s": loading, "inner_s": time.perf_counter() - start}))
    return 0


def plan_of(root: Path) -> str:
    found: str = json.loads((root / "prune.json").read_text())["plan"]
    return found


if __name__ == "__main__":
    sys.exit(main())
