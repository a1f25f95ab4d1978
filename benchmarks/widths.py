"""What fewer neurons, or fewer heads of keys and values, cost without training, beside dropping and low rank.

Every row is perplexity on the same windows of --test; what reads text reads --calibrate alone. Neurons: three quarters
of those of ten layers (10-19), and of all. Low rank at as many stored numbers, and as many numbers in whole mlps that
are dropped, those of the least block influence, stand beside them. Heads: one of three in six layers, and in all. Each
finished row is a line of --journal, and the same command goes on after a stop; --page writes the table.

Target: what is chosen by what it writes below what is drawn, and aligned heads below their mean.

    python benchmarks/widths.py --calibrate wikitext-2-valid.txt --test wikitext-2-raw-test.txt --journal widths.jsonl
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
from shoal.data import Data
from shoal.evaluation import perplexity
from shoal.fitting.result import Job, Transformed
from shoal.live import running
from shoal.models.calls import device_of
from shoal.models.load import Loaded
from shoal.plan import Plan, cost, drop, shapes_of
from shoal.registry import get

KEEP = 0.75
MILD, ALL = "layers 10-19", "all layers"
LAYERS = {MILD: "10-19", ALL: ""}
HOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "drawn": ("narrow", {"by": "random"}),
    "largest": ("narrow", {"by": "magnitude"}),
    "most active": ("narrow", {"by": "activation"}),
    "write most": ("narrow", {"by": "output"}),
    "folded, k-means": ("fold-width", {}),
    "folded, k-means, Fold-AR": ("fold-width", {"repair": "fold-ar"}),
    "folded, Ward": ("fold-width", {"cluster": "ward"}),
}
HEADS = {"layers 12-17": "12-17", ALL: ""}
FUSED = {"one head, mean": {"how": "average"}, "one head, aligned": {}}
Make = Callable[[], Transformed | None]


def main() -> int:
    """Run what the journal lacks, print, and write the page if asked; the exit status says if the target is met."""
    args = _arguments()
    loaded = opened(args)
    size: dict[str, Any] = {"length": args.length}
    test = text_of(loaded, args.test, split="test", limit=args.windows, **size)
    text = text_of(loaded, args.calibrate, split="calibrate", limit=args.sequences, seed=args.seed, **size)
    rows = _rows(loaded, text)
    known = journalled(args, {name: partial(_row, loaded, name, make, test) for name, make in rows.items()})
    found = list(known.values())
    if args.page is not None:
        args.page.write_text(_table(found), encoding="utf-8", newline="\n")
    pairs = {f"{ALL}: write most": f"{ALL}: drawn", f"{ALL}: one head, aligned": f"{ALL}: one head, mean"}
    of = {name: known.get(name, {}).get("perplexity", float("nan")) for pair in pairs.items() for name in pair}
    return finish(
        "widths", args, target=dict.fromkeys(pairs, 1.0), value={a: of[a] / of[b] for a, b in pairs.items()},
        figures={"rows": found}, device=device_of(loaded.model),
    )  # fmt: skip


def _rows(loaded: Loaded, text: Data) -> dict[str, Make]:
    """Names of all rows, with what makes each plan."""
    whole = Plan.identity(loaded.opened.spec, source=loaded.source)

    def made(name: str, **own: Any) -> Make:
        return lambda: get("transforms", name).load()(Job(loaded.model, text, whole), **own)

    rows: dict[str, Make] = {"dense": lambda: None}
    for title, layers in LAYERS.items():
        rows |= {f"{title}: {how}": made(name, keep=KEEP, layers=layers, **own) for how, (name, own) in HOWS.items()}
        span = {"first": 10, "last": 19} if layers else {}
        rows[f"{title}: low rank"] = made("low-rank", part="mlp", rank=_rank(loaded), **span)
        inside = range(10, 20) if layers else range(whole.depth())
        rows[f"{title}: mlps dropped"] = lambda inside=inside: _dropped(loaded, whole, text, inside)
    for title, layers in HEADS.items():
        rows |= {f"{title}: {how}": made("fuse-heads", layers=layers, **own) for how, own in FUSED.items()}
    return rows


def _rank(loaded: Loaded) -> int:
    """Of two factors that hold as many numbers as a share `KEEP` of a matrix of an mlp."""
    neurons = loaded.opened.spec.stack().layers[0].neurons
    assert neurons is not None
    first, second = neurons.reads.shape
    return round(KEEP * first * second / (first + second))


def _dropped(loaded: Loaded, whole: Plan, text: Data, inside: range) -> Transformed:
    """The plan without the mlps of the least block influence among these layers, with as many numbers or fewer."""
    scores = get("measures", "block-influence").load()(loaded.model, text, part="mlp").values
    number = -(-int(100 * (1 - KEEP)) * len(inside) // 100)
    gone = sorted(inside, key=lambda layer: scores[layer])[:number]
    return Transformed(drop(whole, gone, part="mlp"), {})


def _row(loaded: Loaded, name: str, make: Make, test: Data) -> dict[str, Any]:
    began = time.monotonic()
    made = make()
    seconds = round(time.monotonic() - began, 1)
    with nullcontext() if made is None else running(loaded.model, made.plan, made.weights):
        found = perplexity(loaded.model, test).value
    spec = loaded.opened.spec
    plan, weights = (Plan.identity(spec), {}) if made is None else (made.plan, made.weights)
    size = cost(plan, spec, weights=shapes_of(weights))
    plain = {"row": name, "perplexity": round(found, 2), "params": size.params, "kv": size.kv_per_token}
    return plain | {"seconds": seconds}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| {row['row']} | {row['perplexity']:,.2f} | {row['params']:,} | {row['kv']:,} | {row['seconds']:.0f} |"
        for row in rows
    ]
    head = ["| row | perplexity | parameters | KV values a token | seconds |", "|---|---:|---:|---:|---:|"]
    return "\n".join([*head, *lines]) + "\n"


def _arguments() -> argparse.Namespace:
    parser = fitting_options(__doc__)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    return args


if __name__ == "__main__":
    raise SystemExit(main())
