"""What `shoal compare --ray local` saves: the same cells one after the other, and as tasks of two workers.

Both sides fill a folder of their own in each round, with one thread for each process; Ray's start and the import of
torch in its workers count. Target: the same table at least 1.7 times faster, so at most 1/1.7 of the wall time. Decode
and prefill are timed by one process after all cells on either side, which no worker can speed up: `--times` adds that
column, and `cells` are the seconds without it. Reported beside it: the seconds of each search on both sides, which
show how far two processes slow each other down.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import compared, finish, opened, options, paired, say, times

from shoal.api.compare import Compared, compare
from shoal.api.study import Protocol

TARGET = {"time_ratio": 1 / 1.7, "different_rows": 0}
METHODS = ("shortgpt", "gromov", "poor-mans-bert", "prune-and-comp", "replaceme", "sleb", "loss-one-shot")


def main() -> int:
    """Compare twice a round and print; the exit status says whether the target was met."""
    args = _arguments()
    loaded = opened(args)
    protocol = Protocol(
        length=args.length, limit=args.sequences, window=args.window, windows=args.windows, new_tokens=0,
        compared=1, pairs=args.times, prompt=64, decoded=16,
    )  # fmt: skip
    found: dict[str, list[Compared]] = {"alone": [], "ray": []}
    cells: dict[str, list[float]] = {"alone": [], "ray": []}
    with tempfile.TemporaryDirectory() as place:

        def side(name: str) -> tuple[float, float]:
            start, done = (time.perf_counter(), time.process_time()), [time.perf_counter()]

            def progress(number: int, total: int, stage: str) -> None:
                if stage == "cells":
                    done[0] = time.perf_counter()
                    say(f"{name}: {number} of {total} after {done[0] - start[0]:.0f} s")

            folder = Path(place) / f"{name}-{len(found[name])}"
            ray = {"ray": "local", "workers": args.workers} if name == "ray" else {}
            asked: dict[str, Any] = {"methods": args.methods.split(","), "budgets": [args.budgets], **ray}
            found[name].append(compare(loaded, folder, protocol=protocol, progress=progress, **asked))
            cells[name].append(done[0] - start[0])
            return time.perf_counter() - start[0], time.process_time() - start[1]

        samples = paired({"alone": lambda: side("alone"), "ray": lambda: side("ray")}, args.pairs, warmup=0)
    tables = {name: [_table(one) for one in own] for name, own in found.items()}
    different = max(
        sum(a != b for a, b in zip(alone, ray, strict=True))
        for alone, ray in zip(tables["alone"], tables["ray"], strict=True)
    )
    ratio = compared(samples, "ray", "alone")
    figures = {
        "time_ratio": ratio["wall"],
        "times_faster": 1 / ratio["wall"]["median"],
        "seconds": times(samples),
        "cells": cells,
        "search_seconds": {name: _searches(own[-1]) for name, own in found.items()},
        "errors": [row["error"] for row in found["alone"][-1].rows if "error" in row],
    }
    value = {"time_ratio": ratio["wall"]["median"], "different_rows": different}
    return finish("ray_compare", args, target=TARGET, value=value, figures=figures, device=loaded.model.device)


def _table(found: Compared) -> list[Any]:
    """All that must be the same; seconds and memory are not."""
    return [(row["key"], row.get("result"), row.get("error")) for row in found.rows]


def _searches(found: Compared) -> dict[str, float]:
    return {row["key"]: row["measured"]["seconds"] for row in found.rows if "seconds" in row.get("measured", {})}


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, pairs=1)
    parser.add_argument("--workers", type=int, default=2, help="Ray workers (default: %(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="parted by commas (default: %(default)s)")
    parser.add_argument("--budgets", default="layers=0.9,0.8", help="UNIT=SHARE,SHARE (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=4, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens in each (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="test windows (default: %(default)s)")
    parser.add_argument("--window", type=int, default=256, help="tokens in each (default: %(default)s)")
    parser.add_argument("--times", type=int, default=0, help="rounds of timing; 0: none (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
