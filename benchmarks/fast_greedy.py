"""What the fast objective saves: greedy removal of layers against SLEB's released algorithm, which evaluates the whole
model on all the data for every candidate.

Both sides search on the same data, in turn round by round, each on from what it has chosen itself. The exhaustive side
runs every candidate in full; the fast one shares hidden states between candidates and lets them race. Target: the same
layers in at most 1/3 of the wall time (aim: 1/6). Reported beside it: both clocks by round, and the layers computed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from _common import Timed, finish, opened, options, say, timed

from shoal.api.journal import Journaled, journaled, mean_nll
from shoal.data import load_data
from shoal.live import running
from shoal.models.calls import device_of
from shoal.models.inspect import inspect
from shoal.plan import Plan, check
from shoal.scores import Objective
from shoal.search.greedy import greedy

TARGET = {"time_ratio": 1 / 3, "different_layers": 0}


def main() -> int:
    """Search twice and print; the exit status says whether the target was met."""
    args = _arguments()
    loaded = opened(args)
    model = loaded.model
    spec = inspect(model)
    data = load_data(args.data, loaded.tokenizer, length=args.length, limit=args.sequences)
    say(f"{args.model}: {data.info.describe()}, batch {args.batch}, {args.drop} removals")
    plan = Plan.identity(spec)
    fast = journaled(model, plan, batch=args.batch)(data)
    assert isinstance(fast, Journaled)

    def whole(candidate: Plan) -> float:
        with running(model, candidate):
            return mean_nll(model, data, batch=args.batch)

    sides: dict[str, Objective] = {"exhaustive": whole, "fast": fast}
    found = dict.fromkeys(sides, plan)
    rounds: dict[str, list[Timed]] = {side: [] for side in sides}
    whole(plan)  # the first forward touches every weight; it belongs to neither side
    for number in range(args.drop):
        for side in list(sides)[:: 1 if number % 2 == 0 else -1]:
            rounds[side].append(timed(_round(found, side, sides[side], spec), device_of(model)))
        say(f"round {number + 1} of {args.drop}: {_seconds(rounds)}")
    chosen = {side: smaller.dropped() for side, smaller in found.items()}
    totals = {side: [sum(clock) for clock in zip(*times, strict=True)] for side, times in rounds.items()}
    ratios = [fast_ / whole_ for fast_, whole_ in zip(totals["fast"], totals["exhaustive"], strict=True)]
    candidates = sum(len(set(plan.layers())) - number for number in range(args.drop))
    in_full = sum((len(set(plan.layers())) - 1 - n) * (len(set(plan.layers())) - n) for n in range(args.drop))
    figures = {
        "data": data.info.to_dict(),
        "dropped": chosen,
        "candidates": candidates,
        "evaluated_on_all_data": len(fast.known),
        "layers_computed_ratio": fast.loss.layers_run / (in_full * len(fast.loss.batches)),
        "seconds": {side: dict(zip(("wall", "cpu"), clocks, strict=True)) for side, clocks in totals.items()},
        "ratio": dict(zip(("wall", "cpu"), ratios, strict=True)),
        "seconds_by_round": rounds,
    }
    different = len(set(chosen["exhaustive"]) ^ set(chosen["fast"]))
    value = {"time_ratio": ratios[0], "different_layers": different}
    return finish("fast_greedy", args, target=TARGET, value=value, figures=figures, device=model.device)


def _round(found: dict[str, Plan], side: str, objective: Objective, spec: Any) -> Callable[[], None]:
    def remove_one() -> None:
        found[side] = greedy(found[side], objective=objective, drop=1, legal=lambda plan: not check(plan, spec)).plan

    return remove_one


def _seconds(rounds: dict[str, list[Timed]]) -> str:
    return ", ".join(f"{side} {times[-1][0]:.0f} s" for side, times in rounds.items())


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, pairs=1)  # a round of one side is the pair of a round of the other, once
    parser.add_argument("--data", default="builtin", help="a text file, or builtin (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=32, help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens in each (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences in one forward (default: %(default)s)")
    parser.add_argument("--drop", type=int, default=6, help="layers to remove (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
