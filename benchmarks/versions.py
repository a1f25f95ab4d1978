"""What one version of Shoal takes against another, in turn: decoding live, measuring, searching, writing.

Two checkouts run the same work on the built-in model, each in a process of its own that stays up, round by round, the
order alternating. Only the public interface is used, so any two versions can be compared. Target: the new one takes at
most 1.03 x the old one's time for each piece of work (median of the ratios within a round).

    python -m benchmarks.versions --old ../shoal-before --new . --pairs 10
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

LIMIT = 1.03
PLAN = "0-11,15-16,18-24,27-29"
DECODED = 16
PROMPT = 128
FEW = {"fast greedy": 3, "write with proof": 3, "block influence": 6}
"""Rounds of what takes long; everything else takes --pairs."""


def main() -> int:
    """Run both versions in turn and print; the exit status says whether the target was met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="a checkout of the version before")
    parser.add_argument("--new", type=Path, default=Path(), help="a checkout of the version after (default: this one)")
    parser.add_argument("--pairs", type=int, default=10, help="rounds that count (default: %(default)s)")
    parser.add_argument("--model", default="smollm2", help="what shoal.load takes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--only", help="a part of the name of the work, to run no other")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return _child(args)
    if args.old is None:
        parser.error("--old is needed")
    children = {name: Child(getattr(args, name), args) for name in ("old", "new")}
    names = [name for name in children["new"].works if args.only is None or args.only in name]
    figures = {}
    for name in names:
        rounds = min(FEW.get(name, args.pairs), args.pairs)
        seconds: dict[str, list[float]] = {"old": [], "new": []}
        for number in range(rounds + 1):
            for which in ("old", "new") if number % 2 else ("new", "old"):
                took = children[which].run(name)
                if number:  # the first round is for warming up
                    seconds[which].append(took)
        ratios = [new / old for old, new in zip(seconds["old"], seconds["new"], strict=True)]
        figures[name] = {
            "ratio": median(ratios), "least": min(seconds["new"]) / min(seconds["old"]), "ratios": ratios, **seconds
        }  # fmt: skip
        print(f"{name}: {median(ratios):.3f}", file=sys.stderr, flush=True)
    missed = [name for name, found in figures.items() if found["ratio"] > LIMIT]
    value = {name: found["ratio"] for name, found in figures.items()}
    print(json.dumps({"benchmark": "versions", "target": {"ratio": LIMIT}, "value": value, "passed": not missed,
                      "missed": missed, "figures": figures}, indent=2))  # fmt: skip
    return 1 if missed else 0


class Child:
    """A process with one version, told by lines what to run."""

    def __init__(self, checkout: Path, args: argparse.Namespace) -> None:
        source = checkout.resolve() / "src"
        options = ["--child", "--model", args.model, "--threads", str(args.threads)]
        self.process = subprocess.Popen(  # noqa: S603 - this very file
            [sys.executable, __file__, *options],
            env=os.environ | {"PYTHONPATH": str(source)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.works: list[str] = json.loads(self._line())

    def run(self, name: str) -> float:
        """Seconds of one piece of work."""
        assert self.process.stdin is not None
        print(name, file=self.process.stdin, flush=True)
        return float(json.loads(self._line()))

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a version ended before its time; what it said stands above")
        return line


def _child(args: argparse.Namespace) -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    import torch

    import shoal

    torch.set_num_threads(args.threads)
    works = _works(shoal.load(args.model), shoal)
    print(json.dumps(list(works)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(works[line.strip()]()), file=answers, flush=True)
    return 0


def _works(loaded: Any, shoal: Any) -> dict[str, Callable[[], float]]:
    return {
        "decode, no plan": lambda: _decode(loaded.model, nullcontext),
        "decode, identity": lambda: _decode(loaded.model, lambda: shoal.running(loaded.model, "0-29")),
        "decode, 24 layers": lambda: _decode(loaded.model, lambda: shoal.running(loaded.model, PLAN)),
        "decode, exit:after=20": lambda: _policy(loaded.model, shoal, "exit:after=20"),
        "decode, unified": lambda: _policy(loaded.model, shoal, "unified:speedup=2"),
        "block influence": lambda: _timed(lambda: shoal.measure(loaded, "block-influence", length=256, limit=2)),
        "fast greedy": lambda: _timed(lambda: _search(loaded, shoal)),
        "write with proof": lambda: _timed(lambda: _write(loaded, shoal)),
        "entering a plan": lambda: _timed(lambda: _entered(loaded.model, shoal)),
    }


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _policy(model: Any, shoal: Any, policy: str) -> float:
    return _decode(model, lambda: shoal.running(model, "0-29", policy=policy))


def _decode(model: Any, context: Callable[[], Any]) -> float:
    """Seconds of some cached steps of one token behind a prompt."""
    import torch

    ids = torch.randint(0, 1000, (1, PROMPT + DECODED + 1), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), context():
        cache = model(input_ids=ids[:, :PROMPT], use_cache=True).past_key_values
        model(input_ids=ids[:, PROMPT : PROMPT + 1], past_key_values=cache, use_cache=True)
        return _timed(lambda: _steps(model, ids[:, PROMPT + 1 :], cache))


def _steps(model: Any, ids: Any, cache: Any) -> None:
    for at in range(ids.shape[1]):
        model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)


def _search(loaded: Any, shoal: Any) -> None:
    shoal.prune(loaded, method="sleb", drop=1, length=32, limit=4, writable=False)


def _write(loaded: Any, shoal: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shoal.write(loaded, shoal.parse_plan(PLAN, shoal.Plan.identity(shoal.inspect(loaded))), Path(folder) / "out")


def _entered(model: Any, shoal: Any) -> None:
    for _ in range(10):
        with shoal.running(model, PLAN):
            pass


if __name__ == "__main__":
    sys.exit(main())
