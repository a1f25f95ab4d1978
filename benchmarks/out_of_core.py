"""A streamed write of a sharded checkpoint: peak memory, and time beside `cp` and beside mergekit.

A Llama-shaped checkpoint of random bytes is made in a temporary folder, and a plan drops every third layer. Then, in
turns within one run, each in a fresh process and each until its files are on the disk:

* `cp`: `cp -r` of files that hold exactly the bytes that the plan keeps, then fsync of each.
* `copy`: Shoal's streamed write without its proof.
* `write`: the same as a user has it: every byte of source and output is compared as well.
* `mergekit`: `mergekit-yaml` with merge method passthrough and the same slices, then fsync of each file (with --envs).

Targets: peak resident memory of `write`'s process, libraries included, below 1 GiB; the time of `write` itself, from
its call to its return, at most 1.3 times `cp`; the whole process of `write`, start of Python and import of torch
included, faster than mergekit's. All figures are in the result, those without a target too. --cache says whether the
files of the source are in the page cache when a turn begins: read through before (warm) or dropped from it (cold).
Ctrl-C ends the rounds and reports those that are whole.

    python benchmarks/out_of_core.py --gigabytes 4 --envs peer-envs
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from _checkpoint import make

REST = 5
"""Seconds of rest before each turn: a disk that is still busy with the turn before slows the next, whichever it is."""
SHARD = 10**9
# A process of its own, small because a process that was started by a large one counts its memory as its own peak.
_WATCH = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE)
seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({"seconds": seconds, "cpu_s": used.ru_utime + used.ru_stime, "peak_rss_bytes": unit * used.ru_maxrss,
                  "said": done.stdout.decode(), "status": done.returncode}))
"""

Turn = Callable[[Path], dict[str, float]]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gigabytes", type=float, default=4, help="size of the checkpoint (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds that count (default: %(default)s)")
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--envs", type=Path, help="folder of the peers' environments; without it mergekit is left out")
    parser.add_argument("--child", nargs=2, type=Path, metavar=("SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    parser.add_argument("--proof", choices=("with", "without"), default="with", help=argparse.SUPPRESS)
    args = parser.parse_args()
    return child(*args.child, args.proof) if args.child else measure(args)


def measure(args: argparse.Namespace) -> int:
    size = int(args.gigabytes * 1e9)
    turns, versions = the_turns(args.envs)
    with tempfile.TemporaryDirectory(prefix="shoal-out-of-core-", dir=args.folder) as name:
        root = Path(name)
        free = shutil.disk_usage(root).free
        if free < 3 * size:
            print(f"{root} has {free / 1e9:.1f} GB free and {3 * size / 1e9:.1f} GB are needed", file=sys.stderr)
            return 2
        layers = make(root / "base", size)
        kept = bytes_kept(root, layers)
        rounds: list[dict[str, dict[str, float]]] = []
        try:
            for number in range(args.rounds + 1):
                rounds.append(one_round(root, turns, number, args.cache))
                print(f"round {number} of {args.rounds}: {rounds[-1]}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(f"interrupted: {max(0, len(rounds) - 1)} rounds count", file=sys.stderr)
    if len(rounds) < 2:
        return 130
    return report(
        args, rounds[1:], {"layers": layers, "layers_kept": len(kept_layers(layers)), "bytes_kept": kept}, versions
    )


def one_round(root: Path, turns: dict[str, Turn], number: int, cache: str) -> dict[str, dict[str, float]]:
    """Every turn once; another one begins each time."""
    first = number % len(turns)
    found = {}
    for turn in [*list(turns)[first:], *list(turns)[:first]]:
        prepare(root / ("kept" if turn == "cp" else "base"), cache)
        found[turn] = turns[turn](root)
        shutil.rmtree(root / "output")
    return found


def report(
    args: argparse.Namespace, rounds: list[dict[str, dict[str, float]]], facts: dict[str, Any], versions: dict[str, str]
) -> int:
    from shoal.record import environment

    ratios = {"copy_over_cp": ("copy", "inner_s", "cp"), "write_over_cp": ("write", "inner_s", "cp"),
              "process_over_cp": ("write", "seconds", "cp")}  # fmt: skip
    if versions:
        ratios |= {
            "process_over_mergekit": ("write", "seconds", "mergekit"),
            "mergekit_over_cp": ("mergekit", "seconds", "cp"),
        }
    spread = {
        name: quartiles([r[one][kind] / r[other]["seconds"] for r in rounds])
        for name, (one, kind, other) in ratios.items()
    }
    target = {"peak_rss_bytes": 2**30, "write_over_cp": 1.3} | ({"process_over_mergekit": 1.0} if versions else {})
    value = {"peak_rss_bytes": max(r["write"]["peak_rss_bytes"] for r in rounds)} | {
        name: spread[name]["median"] for name in target if name in spread
    }
    missed = [name for name, limit in target.items() if not value[name] <= limit]
    kinds = {turn: rounds[0][turn].keys() for turn in rounds[0]}
    result = {
        "benchmark": "out_of_core",
        "target": target,
        "value": value,
        "passed": not missed,
        "missed": missed,
        "figures": facts | {
            "ratios": spread,
            "medians": {t: {kind: median(r[t][kind] for r in rounds) for kind in sorted(kinds[t])} for t in kinds},
            "rounds": rounds,
        },
        "settings": {
            "gigabytes": args.gigabytes, "rounds": len(rounds),
            "load average": os.getloadavg(), "page cache of the source": args.cache,
            "shard_size": SHARD, "mergekit": {"options": MERGEKIT, **versions} if versions else "left out: no --envs",
        },
        "environment": environment(),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    return 1 if missed else 0


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "q1": low, "q3": high}


def kept_layers(depth: int) -> list[int]:
    return [i for i in range(depth) if i % 3 != 1]


def notation(depth: int) -> str:
    return ",".join(map(str, kept_layers(depth)))


def bytes_kept(root: Path, depth: int) -> int:
    """Files for `cp` with exactly as many bytes as the plan keeps, in shards like those of the stream."""
    from shoal.models.inspect import inspect
    from shoal.models.load import load_config
    from shoal.models.meta import meta_model
    from shoal.plan import Plan, parse_plan
    from shoal.writing.container import write_shards
    from shoal.writing.manifest import manifest_of

    plan = parse_plan(notation(depth), Plan.identity(inspect(meta_model(load_config(root / "base")))))
    draft = manifest_of(root / "base", plan)
    (root / "kept").mkdir()
    write_shards(root / "kept", draft.items, SHARD, lambda _: None)
    return draft.bytes


def prepare(folder: Path, cache: str) -> None:
    """Rest until nothing is left to write, with the files of `folder` in the page cache or out of it."""
    os.sync()
    time.sleep(REST)
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            if cache == "cold":
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cache == "warm" and stream.read(16 << 20):
                pass


MERGEKIT = ["--lazy-unpickle", "--async-write", "--no-copy-tokenizer", "--quiet", "--out-shard-size", str(SHARD // 2)]
"""Shards are counted in parameters, of 2 bytes here; the checkpoint has no tokenizer, for nobody."""


def the_turns(envs: Path | None) -> tuple[dict[str, Turn], dict[str, str]]:
    """{name: what runs it}, and the versions in mergekit's environment."""
    turns: dict[str, Turn] = {
        "cp": lambda root: watched(["cp", "-r", str(root / "kept"), str(root / "output")], root),
        "copy": lambda root: streamed(root, "without"),
        "write": lambda root: streamed(root, "with"),
    }
    if envs is None:
        return turns, {}
    from peers.environments import built

    where = built(envs.resolve(), "mergekit")
    if where.error:
        raise SystemExit(f"mergekit cannot be installed: {where.error}")

    def mergekit(root: Path) -> dict[str, float]:
        depth = json.loads((root / "base" / "config.json").read_text())["num_hidden_layers"]
        slices = "".join(f"  - sources:\n      - model: {root / 'base'}\n        layer_range: [{layer}, {layer + 1}]\n"
                         for layer in kept_layers(depth))  # fmt: skip
        (root / "slices.yaml").write_text(f"slices:\n{slices}merge_method: passthrough\ndtype: bfloat16\n")
        tool = str(where.python.with_name("mergekit-yaml"))
        return watched([tool, str(root / "slices.yaml"), str(root / "output"), *MERGEKIT], root)

    return turns | {"mergekit": mergekit}, where.versions


def watched(command: list[str], root: Path) -> dict[str, float]:
    """A whole process, and fsync of what it wrote."""
    found = watch(command)
    start = time.perf_counter()
    for file in (root / "output").iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    found["seconds"] += time.perf_counter() - start
    return found


def streamed(root: Path, proof: str) -> dict[str, float]:
    """A whole process, and in it the write alone (`inner_s`), which brings its files to the disk itself."""
    command = [sys.executable, __file__, "--child", str(root / "base"), str(root / "output"), "--proof", proof]
    return watch(command)


def watch(command: list[str]) -> dict[str, float]:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-S", "-c", _WATCH, *command], check=True, stdout=subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    said, status = found.pop("said"), found.pop("status")
    if status:
        raise SystemExit(f"{command[0]} ended with {status}")
    if said.startswith("{"):
        found |= json.loads(said)
    return {name: round(number, 3) for name, number in found.items()}


def child(source: Path, output: Path, proof: str) -> int:
    """Stream once, in this process alone."""
    from shoal.models.compat import hide_own_bars
    from shoal.models.load import inspect_source
    from shoal.plan import Plan, parse_plan
    from shoal.writing import stream as module

    hide_own_bars()
    spec = inspect_source(source)
    plan = parse_plan(notation(spec.stack().depth), Plan.identity(spec))
    if proof == "without":
        module.copy_checks = lambda *_: ()
        module.CopyCheck.add = lambda *_: None
    start = time.perf_counter()
    made = module.stream(source, plan, output, shard_size=f"{SHARD}B")
    seconds = time.perf_counter() - start
    print(json.dumps({"inner_s": seconds, "checks": len(made.proof.checks)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
