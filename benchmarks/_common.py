"""What the benchmarks share: their options, paired timing within one process, and the one JSON object they print."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from shoal.api.assess import text_of
from shoal.data import Data
from shoal.data.spelled import keyed
from shoal.executing.timing import synchronized_time
from shoal.models.compat import hide_own_bars
from shoal.models.load import Loaded, load
from shoal.record import append_line, environment, read_objects

PRUNED = "0-11,15-16,18-24,27-29"
"""The 24-layer plan of the 30-layer built-in model."""

Timed = tuple[float, float]
"""Seconds by the wall clock, and seconds of CPU time of this process, all its threads together."""


def options(description: str | None, *, pairs: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; `pairs` is the default of --pairs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pairs", type=_positive, default=pairs, help="rounds that count (default: %(default)s)")
    parser.add_argument("--model", default="smollm2", help="what shoal.load takes (default: %(default)s)")
    parser.add_argument("--threads", type=_positive, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator torch finds, else the CPU)")
    parser.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default: as shoal.load has it)")
    return parser


def fitting_options(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what benchmarks ask for that fit on one text and judge by another, row by row."""
    parser = options(doc, pairs=1)
    parser.add_argument("--calibrate", required=True, help="text to fit and to choose on")
    parser.add_argument("--test", required=True, help="text to judge by")
    parser.add_argument("--sequences", type=int, default=8, help="of the calibration text (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=3, help="of the test text (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="rows whose name holds this; again for more")
    parser.add_argument("--journal", type=Path, required=True, help="a line for each finished row")
    parser.add_argument("--page", type=Path, help="write the table here")
    return parser


def journalled(args: argparse.Namespace, rows: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The finished ones of `rows` by name, in order: those in --journal, and those that are made now, which --only
    may restrict."""
    known = {row["row"]: row for row in read_objects(args.journal) if row}
    for name, make in rows.items():
        if name not in known and (not args.only or any(one in name for one in args.only)):
            known[name] = make()
            append_line(args.journal, known[name])
            say(json.dumps(known[name]))
    return {name: known[name] for name in rows if name in known}


def training_options(parser: argparse.ArgumentParser, *, windows: int) -> None:
    """Add what benchmarks of healing read and how much of it; `windows` is the default of --windows."""
    parser.add_argument("--train", required=True, help="text to train on")
    parser.add_argument("--test", required=True, help="text of the same kind to judge by")
    parser.add_argument("--second", required=True, help="text of another kind")
    parser.add_argument("--text-key", help="the key of the second text, where it is .jsonl")
    parser.add_argument("--length", type=int, default=256, help="tokens of a training window (default: %(default)s)")
    parser.add_argument("--held", type=int, default=6, help="windows that are held out (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="windows in a forward (default: %(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens of a test window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=windows, help="of each test text (default: %(default)s)")


def trained_rows(parser: argparse.ArgumentParser, of: str) -> argparse.Namespace:
    """The arguments of a benchmark that trains row by row, with the options that such have beside their own; `of`: what
    --tokens are of."""
    parser.add_argument("--tokens", default="12k", help=f"of each {of} (default: %(default)s)")
    parser.add_argument("--only", action="append", help="rows whose name holds this; again for more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--journal", type=Path, required=True, help="a line for each finished row")
    parser.add_argument("--page", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    args.second_text = keyed(args.second, args.text_key, None)
    return args


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1; give 1 or more")
    return number


def opened(args: argparse.Namespace) -> Loaded:
    """The model of --model on --device, with torch held to --threads."""
    torch.set_num_threads(args.threads)
    hide_own_bars()
    return load(args.model, device=args.device, dtype=args.dtype)


def say(text: str) -> None:
    """One line of progress on stderr; stdout belongs to the result."""
    print(text, file=sys.stderr, flush=True)


def timed(work: Callable[[], object], device: torch.device) -> Timed:
    """Seconds that `work` takes, work handed to `device` included."""
    wall, cpu = synchronized_time(device), time.process_time()
    work()
    return synchronized_time(device) - wall, time.process_time() - cpu


def paired(
    variants: Mapping[str, Callable[[], Timed]], pairs: int, *, warmup: int = 1, what: str = "round"
) -> dict[str, list[Timed]]:
    """Run every variant once in each of `pairs` rounds, after `warmup` rounds that do not count.

    The order alternates from round to round, so that neither the first place nor a drift of the machine favours one.
    """
    samples: dict[str, list[Timed]] = {name: [] for name in variants}
    for number in range(warmup + pairs):
        for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
            sample = variants[name]()
            if number >= warmup:
                samples[name].append(sample)
        if (number + 1) % max(1, (warmup + pairs) // 10) == 0:
            say(f"{what} {number + 1} of {warmup + pairs}")
    return samples


def spread(values: list[float]) -> dict[str, float]:
    """Median, least, greatest and the quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    facts = {"median": median(values), "min": min(values), "max": max(values), "q25": low, "q75": high}
    return {name: _rounded(value) for name, value in facts.items()}


def compared(samples: Mapping[str, list[Timed]], name: str, base: str) -> dict[str, dict[str, float]]:
    """`name` over `base`: the spread of the ratios within a round, and the ratio of the two least times.

    Once by the wall clock, once by CPU time, which with one thread does not see what else the machine does.
    """
    result = {}
    for place, clock in enumerate(("wall", "cpu")):
        own, other = ([sample[place] for sample in samples[n]] for n in (name, base))
        ratios = spread([a / b for a, b in zip(own, other, strict=True)])
        result[clock] = ratios | {"of_least": _rounded(min(own) / min(other))}
    return result


def times(samples: Mapping[str, list[Timed]], divisor: float = 1) -> dict[str, dict[str, dict[str, float]]]:
    """The spread of each variant's seconds (over `divisor` pieces of work), by wall clock and by CPU time."""
    return {
        name: {
            clock: spread([sample[place] / divisor for sample in own]) for place, clock in enumerate(("wall", "cpu"))
        }
        for name, own in samples.items()
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def finish(
    name: str,
    args: argparse.Namespace,
    *,
    target: Mapping[str, float],
    value: Mapping[str, float],
    figures: Mapping[str, Any],
    device: torch.device,
) -> int:
    """Print the result and return the exit status: 0 when every value is at most its target, else 1."""
    missed = [key for key, limit in target.items() if not value[key] <= limit]
    where = {"device": str(device), "threads": torch.get_num_threads()}
    result = {
        "benchmark": name,
        "target": dict(target),
        "value": {key: _rounded(number) for key, number in value.items()},
        "passed": not missed,
        "missed": missed,
        "figures": figures,
        "settings": {name: setting for name, setting in vars(args).items() if name not in ("child", "profile")},
        "environment": environment() | where,
    }
    print(json.dumps(result, indent=2, default=str))  # paths
    return 1 if missed else 0


def disjoint(loaded: Loaded, texts: dict[str, Data], args: argparse.Namespace) -> bool:
    """Whether no window of the training text is one of the test texts', however they are cut: by the hashes of all
    pieces of 64 tokens at every 64th place, against the same at every place of the test text."""
    train = text_of(loaded, args.train, split="calibrate", length=args.length, limit=100_000, seed=args.seed)
    pieces = {_digest(row[at : at + 64]) for row in train.ids for at in range(0, len(row) - 63, 64)}
    return not any(
        _digest(row[at : at + 64]) in pieces
        for data in texts.values()
        for row in data.ids
        for at in range(len(row) - 63)
    )


def _digest(ids: torch.Tensor) -> bytes:
    return hashlib.sha256(ids.numpy().tobytes()).digest()
