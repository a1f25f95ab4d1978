"""What sharing keys and values, or attention maps, costs without training, beside dropping as many attentions.

Every row is perplexity on the same windows of --test; what is fitted or chosen reads --calibrate alone. The sets `four`
and `seven` were found by an earlier scan on test text, and so are hints; `picked` rows choose their layers on
calibration text: pairs by the method `aligned-kv`, attentions by the loss without each one, both on the same windows.
Each finished row is a line of --journal, and the same command goes on after a stop; --page writes the table.

Target: aligned sharing of seven pairs below 45, of all fifteen below 700, where averages have 95 and 31,000.

    python benchmarks/sharing.py --calibrate wikitext-2-valid.txt --test wikitext-2-raw-test.txt --journal sharing.jsonl
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from _common import finish, fitting_options, journalled, opened

from shoal.api.assess import text_of
from shoal.api.journal import journaled
from shoal.data import Data
from shoal.evaluation import perplexity
from shoal.fitting.result import Job, Transformed
from shoal.live import running
from shoal.methods._job import PruningJob
from shoal.models.calls import device_of
from shoal.models.load import Loaded
from shoal.plan import Plan, check, cost, drop
from shoal.registry import get

FOUR = "4-5+9-10+25-26+28-29"
SEVEN = f"{FOUR}+7-8+11-12+13-14"
LATE = "16-17+18-19+20-21+22-23+24-25+26-27+28-29"
SETS = {"4 pairs": FOUR, "7 pairs": SEVEN, "7 pairs from 16 on": LATE, "all 15 pairs": ""}
HOWS: dict[str, dict[str, Any]] = {
    "the first's own": {"how": "first"},
    "average": {"how": "average"},
    "aligned, not weighted": {"weighted": False},
    "aligned": {},
}
MIDDLE = "9-10+11-12+13-14+15-16+17-18+19-20+21-22+23-24"
FOLLOW = {"26-29 of 25": {"span": "26-29"}, "23-26 of 22": {"span": "23-26"}, "8 pairs from 9 to 24": {"pairs": MIDDLE}}
Make = Callable[[], Transformed | None]


def main() -> int:
    """Run what the journal lacks, print, and write the page if asked; the exit status says if the target is met."""
    args = _arguments()
    loaded = opened(args)
    size: dict[str, Any] = {"length": args.length}
    test = text_of(loaded, args.test, split="test", limit=args.windows, **size)
    text = text_of(loaded, args.calibrate, split="calibrate", limit=args.sequences, seed=args.seed, **size)
    rows = _rows(loaded, text, args)
    known = journalled(args, {name: partial(_row, loaded, name, make, test) for name, make in rows.items()})
    found = list(known.values())
    if args.page is not None:
        args.page.write_text(_table(found), encoding="utf-8", newline="\n")
    value = {
        name: known.get(name, {}).get("perplexity", float("inf"))
        for name in ("7 pairs: aligned", "all 15 pairs: aligned")
    }
    return finish(
        "sharing", args, target=dict(zip(value, (45.0, 700.0), strict=True)), value=value, figures={"rows": found},
        device=device_of(loaded.model),
    )  # fmt: skip


def _rows(loaded: Loaded, text: Data, args: argparse.Namespace) -> dict[str, Make]:
    """Names of all rows, with what makes each plan."""
    spec = loaded.opened.spec
    whole = Plan.identity(spec, source=loaded.source)

    def made(name: str, **own: Any) -> Make:
        return lambda: get("transforms", name).load()(Job(loaded.model, text, whole), **own)

    def picked(name: str, number: int, **own: Any) -> Make:
        def make() -> Transformed:
            job = PruningJob(
                model=loaded.model, data=text, plan=whole, spec=spec, legal=lambda plan: not check(plan, spec),
                objective=journaled(loaded.model, whole, batch=1),
            )  # fmt: skip
            found = get("methods", name).load()(job, drop=number, **own)
            return Transformed(found.plan, found.weights)

        return make

    def dropped(pairs: str) -> Make:
        readers = [int(pair.split("-")[1]) for pair in pairs.split("+")]
        return lambda: Transformed(drop(whole, readers, part="attention"), {})

    rows: dict[str, Make] = {"dense": lambda: None}
    for title, pairs in SETS.items():
        rows |= {f"{title}: {how}": made("share-kv", pairs=pairs, **own) for how, own in HOWS.items()}
        rows[f"{title}: these attentions dropped"] = dropped(pairs or "+".join(f"{n}-{n + 1}" for n in range(0, 30, 2)))
    for number in (4, 7):
        rows[f"{number} picked pairs: aligned"] = picked("aligned-kv", number, judged=args.judged)
        rows[f"{number} picked attentions dropped"] = lambda n=number: _attentions(loaded, whole, text, n, args.judged)
    rows["4 readers: kvsharer"] = picked("kvsharer", 4, threshold=-1.0)
    for title, own in FOLLOW.items():
        rows[f"maps, {title}: head by head"] = made("share-maps", **own, matched=False)
        rows[f"maps, {title}: heads matched"] = made("share-maps", **own)
    return rows


def _attentions(loaded: Loaded, whole: Plan, text: Data, number: int, judged: int) -> Transformed:
    """The attentions without each of which the loss on the first `judged` sequences is lowest, all dropped."""
    loss = journaled(loaded.model, whole, batch=1)(text.only(range(judged)))
    plans = {layer: drop(whole, [layer], part="attention") for layer in range(1, whole.depth())}
    gone = sorted(plans, key=lambda layer: loss(plans[layer]))[:number]
    return Transformed(drop(whole, gone, part="attention"), {})


def _row(loaded: Loaded, name: str, make: Make, test: Data) -> dict[str, Any]:
    began = time.monotonic()
    made = make()
    seconds = round(time.monotonic() - began, 1)
    with nullcontext() if made is None else running(loaded.model, made.plan, made.weights):
        found = perplexity(loaded.model, test).value
    spec = loaded.opened.spec
    plan = Plan.identity(spec) if made is None else made.plan
    plain = {"row": name, "perplexity": round(found, 2), "kv": cost(plan, spec).kv_per_token, "seconds": seconds}
    return plain | {"plan": str(plan)}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| {row['row']} | {row['perplexity']:,.2f} | {row['kv']:,} | {row['seconds']:.0f} |" for row in rows]
    return "\n".join(["| row | perplexity | KV values a token | seconds |", "|---|---:|---:|---:|", *lines]) + "\n"


def _arguments() -> argparse.Namespace:
    parser = fitting_options(__doc__)
    parser.add_argument("--judged", type=int, default=2, help="of these, to choose layers by (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    return args


if __name__ == "__main__":
    raise SystemExit(main())
