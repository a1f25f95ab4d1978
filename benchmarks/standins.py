"""What stands in best for removed layers: perplexity of dropping and of every closed-form stand-in, on one plan and for
each single layer.

    python benchmarks/standins.py --calibrate wiki.valid.txt --test wiki.test.txt

Calibration and test text are files of plain text. Prints one JSON object.
"""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

from _common import PRUNED, opened, options, say

from shoal.data import Data, load_data
from shoal.evaluation import perplexity
from shoal.fitting.result import Job
from shoal.live import running
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.plan import Plan, drop, parse_plan
from shoal.record import environment
from shoal.registry import get


def main() -> None:
    args = _arguments()
    loaded = opened(args)
    calibrate = load_data(args.calibrate, loaded.tokenizer, length=args.length, limit=args.sequences, split="whole")
    test = load_data(args.test, loaded.tokenizer, length=args.window, limit=args.windows, split="whole")
    dense = perplexity(loaded.model, test, batch=args.batch).value
    say(f"dense {dense:.3f}")
    result: dict[str, Any] = {
        "model": loaded.source,
        "calibrate": calibrate.info.to_dict(),
        "test": test.info.to_dict(),
        "dense": dense,
        "plans": [],
        "layers": [],
        "environment": environment(),
    }
    identity = Plan.identity(inspect(loaded.model))
    for text in args.plans:
        result["plans"].append(_rows(loaded, parse_plan(text, identity), args.stand_ins, calibrate, test, args.batch))
    for layer in args.each:
        rows = _rows(loaded, drop(identity, [layer]), args.stand_ins, calibrate, test, args.batch)
        result["layers"].append({"layer": layer, "rows": rows})
    print(json.dumps(result, indent=1))


def _rows(
    loaded: Loaded, plan: Plan, names: list[str], calibrate: Data, test: Data, batch: int
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"stand_in": "drop", "plan": str(plan), **_worth(loaded, plan, {}, test, batch)}]
    say(f"{plan} drop {rows[0]['perplexity']:.3f}")
    for spelled in names:
        name, _, text = spelled.partition(":")
        entry = get("transforms", name)
        own = entry.parse([piece for piece in text.split(",") if piece])
        made = entry.load()(Job(loaded.model, calibrate, plan, batch=batch), **own)
        rows.append({"stand_in": spelled, **made.to_dict(), **_worth(loaded, made.plan, made.weights, test, batch)})
        say(f"{plan} {spelled} {rows[-1]['perplexity']:.3f} {made.notes}")
    return rows


def _worth(loaded: Loaded, plan: Plan, weights: Any, test: Data, batch: int) -> dict[str, float | None]:
    with running(loaded.model, plan, weights):
        found = perplexity(loaded.model, test, batch=batch)
    return {"perplexity": found.value, "nll": found.nll, "error": found.error}


def _arguments() -> Namespace:
    parser = options(__doc__, pairs=1)
    parser.add_argument("--calibrate", required=True, help="a text file to fit on")
    parser.add_argument("--test", required=True, help="a text file to test on")
    parser.add_argument("--sequences", type=int, default=32, help="calibration sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens in each (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=8, help="test windows (default: %(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="tokens in each (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--plans", nargs="*", default=[PRUNED], help="plans that lack something (default: %(default)s)")
    parser.add_argument("--each", type=_numbers, default=(), help="single layers to drop and to stand in for")
    parser.add_argument(
        "--stand-ins",
        nargs="+",
        default=["bias-patch", "channel-scale", "compensate", "replaceme", "refit", "low-rank-map", "linear-map"],
        help="transforms, as NAME or NAME:key=value,...",
    )
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(piece) for piece in text.split(",") if piece)


if __name__ == "__main__":
    main()
