"""A streamed write of a sharded checkpoint that is larger than its memory: peak memory, and time beside `cp`.

A Llama-shaped checkpoint of random bytes is made in a temporary folder. Then, in turns within one run: `cp` copies
files that hold exactly the bytes that the plan keeps, and they are brought to the disk; a fresh process streams the
plan that drops every third layer, and brings it to the disk too: once without its proof (`copy_s`) and once as a user
does it (`whole_s`), where source and output are read once more to compare every tensor by SHA-256. Targets: peak
resident memory of the fresh process (libraries included) below 1 GiB, and `copy_s` at most 1.3 times `cp_s`.

    python benchmarks/out_of_core.py --gigabytes 4
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

MADE = 32 << 20
REST = 5
"""Seconds of rest before each turn: a disk that is still busy with the turn before slows the next, whichever it is."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gigabytes", type=float, default=4, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="paired rounds that count (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--child", nargs=2, type=Path, metavar=("SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    parser.add_argument("--proof", choices=("with", "without"), default="with", help=argparse.SUPPRESS)
    args = parser.parse_args()
    return child(*args.child, args.proof) if args.child else measure(args)


def measure(args: argparse.Namespace) -> int:
    size = int(args.gigabytes * 1e9)
    with tempfile.TemporaryDirectory(prefix="shoal-out-of-core-", dir=args.folder) as name:
        root = Path(name)
        free = shutil.disk_usage(root).free
        if free < 3.5 * size:
            print(f"{root} has {free / 1e9:.1f} GB free and {3.5 * size / 1e9:.1f} GB are needed", file=sys.stderr)
            return 2
        layers = make(root / "base", size)
        kept = bytes_kept(root, layers)
        os.sync()
        rounds = []
        for number in range(args.rounds + 1):
            turns = [copied, streamed] if number % 2 else [streamed, copied]
            found: dict[str, Any] = {}
            for turn in turns:
                found |= turn(root)
            print(f"round {number} of {args.rounds}: {found}", file=sys.stderr)
            rounds.append(found)
        return report(args, rounds[1:], layers, kept)


def report(args: argparse.Namespace, rounds: list[dict[str, Any]], layers: int, kept: int) -> int:
    from shoal.record import environment

    value = {
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in rounds),
        "copy_over_cp": median(r["copy_s"] / r["cp_s"] for r in rounds),
    }
    target = {"peak_rss_bytes": 2**30, "copy_over_cp": 1.3}
    missed = [name for name, limit in target.items() if not value[name] <= limit]
    whole = median(r["whole_s"] / r["cp_s"] for r in rounds)
    result = {
        "benchmark": "out_of_core",
        "target": target,
        "value": value,
        "passed": not missed,
        "missed": missed,
        "figures": {
            "layers": layers, "layers_kept": len(kept_layers(layers)), "bytes_kept": kept,
            "whole_over_cp": whole, "rounds": rounds,
        },
        "settings": {"gigabytes": args.gigabytes, "rounds": args.rounds},
        "environment": environment(),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    return 1 if missed else 0


def kept_layers(depth: int) -> list[int]:
    return [i for i in range(depth) if i % 3 != 1]


def make(folder: Path, size: int) -> int:
    """Write the checkpoint in shards of about 1 GB (a tenth of it when it is small); returns the number of layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from shoal.models.compat import hide_own_bars

    hide_own_bars()
    facts: dict[str, Any] = {
        "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16,
        "num_key_value_heads": 8, "dtype": "bfloat16",
    }  # fmt: skip
    with torch.device("meta"):
        one, two = ({n: t.shape for n, t in LlamaForCausalLM(LlamaConfig(**facts, num_hidden_layers=d)).state_dict()
                     .items()} for d in (1, 2))  # fmt: skip
    layer = 2 * sum(s.numel() for n, s in two.items() if n not in one)
    depth = max(3, round((size - 2 * sum(s.numel() for s in one.values())) / layer) + 1)
    config = LlamaConfig(**facts, num_hidden_layers=depth)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in LlamaForCausalLM(config).state_dict().items()}
    write_random(folder, shapes, size // 10 if size < 10**9 else 10**9)
    return depth


def write_random(folder: Path, shapes: dict[str, tuple[int, ...]], limit: int) -> None:
    from math import prod

    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if shards[-1] and held + 2 * prod(shape) > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += 2 * prod(shape)
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    noise = os.urandom(MADE)
    turn = 0
    for file, shard in zip(files, shards, strict=True):
        header, place = {}, 0
        for name in shard:
            end = place + 2 * prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [place, end]}
            place = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            while place:  # the same noise from another start each time, so no two tensors are equal
                turn = (turn + 104_729) % (MADE // 2)
                stream.write(noise[turn : turn + min(place, MADE // 2)])
                place -= min(place, MADE // 2)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def bytes_kept(root: Path, depth: int) -> int:
    """Files for `cp` with exactly as many bytes as the plan keeps, in shards like those of the stream."""
    from shoal.models.inspect import inspect
    from shoal.models.load import load_config, meta_model
    from shoal.plan import Plan, parse_plan
    from shoal.writing.container import write_shards
    from shoal.writing.draft import draw

    plan = parse_plan(notation(depth), Plan.identity(inspect(meta_model(load_config(root / "base")))))
    draft = draw(root / "base", plan)
    (root / "kept").mkdir()
    write_shards(root / "kept", draft.items, 10**9, lambda _: None)
    return draft.bytes


def notation(depth: int) -> str:
    return ",".join(map(str, kept_layers(depth)))


def rest() -> None:
    os.sync()
    time.sleep(REST)


def copied(root: Path) -> dict[str, Any]:
    rest()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(root / "kept"), str(root / "copy")], check=True)  # noqa: S603, S607
    sync(root / "copy")
    seconds = time.perf_counter() - start
    shutil.rmtree(root / "copy")
    return {"cp_s": round(seconds, 3)}


def sync(folder: Path) -> None:
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def streamed(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for proof in ("without", "with"):
        rest()
        command = [sys.executable, __file__, "--child", str(root / "base"), str(root / "streamed"), "--proof", proof]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)  # noqa: S603
        shutil.rmtree(root / "streamed")
        answer = json.loads(done.stdout)
        found["peak_rss_bytes"] = max(found.get("peak_rss_bytes", 0), answer.pop("peak_rss_bytes"))
        found["copy_s" if proof == "without" else "whole_s"] = answer["seconds"]
        found["checks"] = answer["checks"]
    return found


def child(source: Path, output: Path, proof: str) -> int:
    """Stream once, in this process alone."""
    from shoal.models.compat import hide_own_bars
    from shoal.models.inspect import inspect
    from shoal.models.load import load_config, meta_model
    from shoal.plan import Plan, parse_plan
    from shoal.writing import stream as module

    hide_own_bars()
    config = load_config(source)
    plan = parse_plan(notation(config.num_hidden_layers), Plan.identity(inspect(meta_model(config))))
    if proof == "without":
        module.compared = lambda *_: ((), "")
    start = time.perf_counter()
    made = module.stream(source, plan, output, shard_size="1GB")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": round(seconds, 3), "checks": len(made.proof.checks), "peak_rss_bytes": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
