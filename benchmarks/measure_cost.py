"""What block influence costs: the measure against one plain forward over the same tokens.

Targets: at most 1.25 times the wall time and 1.15 times the peak memory of the stock `model(...)`, head included,
without gradients and cache. Time is paired within this process. Memory is the growth of the peak resident set over what
the loaded and warmed model holds, in fresh processes that do exactly one of the two; further processes, under torch's
profiler, count what torch allocates. Reported without a target: the same against the forward without its head.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import Timed, compared, finish, opened, options, paired, say, timed, times

from shoal.data import Data, load_data
from shoal.measures.block_influence import block_influence
from shoal.models.calls import device_of

TARGET = {"time_ratio": 1.25, "memory_ratio": 1.15}
SIDES = ("forward", "backbone", "measure")
STATUS = Path("/proc/self/status")


def main() -> int:
    """Measure and print; the exit status says whether both targets were met."""
    args = _arguments()
    loaded = opened(args)
    model = loaded.model
    data = load_data(args.data, loaded.tokenizer, length=args.length, limit=args.sequences)
    sides = works(model, data, args.batch)
    if args.child:
        print(json.dumps(held(sides[args.child], lambda: warm(model), profile=args.profile)))
        return 0
    say(f"{args.model}: {data.info.describe()}, batch {args.batch}")
    memory = {side: _in_child(side) | _in_child(side, "--profile") for side in SIDES}
    samples = paired({name: _timer(work, device_of(model)) for name, work in sides.items()}, args.pairs)
    against = {name: compared(samples, "measure", name) for name in ("forward", "backbone")}
    figures = {
        "data": data.info.to_dict(),
        "time_ratio": against,
        "seconds": times(samples),
        "memory": memory,
        "memory_ratio": {
            f"{name}_{what}": memory["measure"][what] / memory[name][what]
            for name in against
            for what in ("growth_bytes", "torch_bytes", "peak_bytes")
        },
    }
    value = {
        "time_ratio": against["forward"]["wall"]["median"],
        "memory_ratio": memory["measure"]["growth_bytes"] / memory["forward"]["growth_bytes"],
    }
    return finish("measure_cost", args, target=TARGET, value=value, figures=figures, device=model.device)


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, pairs=7)
    parser.add_argument("--data", default="builtin", help="a text file, or builtin (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=4, help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens in each (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences in one forward (default: %(default)s)")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def works(model: Any, data: Data, batch: int) -> dict[str, Callable[[], object]]:
    """The measure, the plain forward, and the forward without its head, over the same tokens."""
    device = device_of(model)

    @torch.no_grad()
    def over(module: Any) -> None:
        for ids, mask in data.batches(batch):
            attention = {} if mask is None else {"attention_mask": mask.to(device)}
            module(input_ids=ids.to(device), use_cache=False, **attention)

    return {
        "forward": lambda: over(model),
        "backbone": lambda: over(model.base_model),
        "measure": lambda: block_influence(model, data, batch=batch),
    }


def _timer(work: Callable[[], object], device: torch.device) -> Callable[[], Timed]:
    return lambda: timed(work, device)


@torch.no_grad()
def warm(model: Any) -> None:
    """A short forward: weights that are mapped from a file become resident before anything is counted."""
    model(input_ids=torch.zeros((1, 8), dtype=torch.long, device=device_of(model)), use_cache=False)


def held(work: Callable[[], object], first: Callable[[], object], *, profile: bool) -> dict[str, int]:
    """Bytes that `work` adds at its worst, after `first`: by torch's count, or by this process's resident set."""
    first()
    if profile:
        return {"torch_bytes": allocated(work)}
    before = _restart_peak()
    work()
    peak = _peak()
    return {"before_bytes": before, "peak_bytes": peak, "growth_bytes": peak - before}


def _restart_peak() -> int:
    """Forget the peak that loading left behind, where the system can, and return the bytes held now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return _status("VmRSS")


def _peak() -> int:
    """The peak resident set in bytes; `ru_maxrss` is in kilobytes on Linux and in bytes on macOS."""
    if STATUS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def allocated(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held at once beyond what it held at the start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    steps = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    now = most = 0
    for _, change in steps:
        now += change
        most = max(most, now)
    return most


def _in_child(side: str, *extra: str) -> dict[str, int]:
    """Run one side alone in a fresh process with the options of this one."""
    say(f"memory of the {side}, {'counted by torch' if extra else 'resident set'}")
    done = subprocess.run(  # noqa: S603
        [sys.executable, *sys.argv, "--child", side, *extra], stdout=subprocess.PIPE, text=True, check=True
    )
    numbers: dict[str, int] = json.loads(done.stdout)
    return numbers


if __name__ == "__main__":
    sys.exit(main())
