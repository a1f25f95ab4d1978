"""Ties, shared keys, values and maps, low rank and dropping at equal stored numbers, before and after one distillation.

Groups: plans with about three quarters of the parameters; plans that keep half of the keys and values; and three kinds
of sharing, each beside dropping: keys and values of a quarter of the layers, one mlp for all, maps of the last four
layers. Each row is the plan as it is made (fitted on --train), and after --tokens of distillation from the whole model
on the same windows in the same order (`shoal heal`, recipe logit-kd; what learns is in the table). Training text and
test texts share no 64 tokens. Each finished row is a line of --journal, and the same command goes on after a stop;
--page renders the journal as tables, best first, whoever wins.

Target: a start from pretrained layers beats a random one after equal steps (relaxed recursion's own claim).

    python benchmarks/equal_size.py --train wikitext-2-valid.txt --test wikitext-2-raw-test.txt \\
        --second lambada_openai.jsonl --text-key context --tokens 12k --journal equal-size.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from _common import disjoint, finish, opened, options, say, trained_rows, training_options

from shoal.api.assess import text_of
from shoal.api.heal import heal
from shoal.api.prune import prune
from shoal.cli.heal import tokens_of
from shoal.data import Data
from shoal.evaluation import perplexity
from shoal.fitting.result import Job, Transformed
from shoal.live import running
from shoal.models.calls import device_of
from shoal.models.load import Loaded
from shoal.plan import Plan, cost, drop, parse_plan, shapes_of
from shoal.plan.steps import runs
from shoal.record import append_line, read_objects
from shoal.registry import get

PARAMETERS, KV = "parameters", "keys and values"
SOME_KV, MLP, MAPS = "some keys and values", "one mlp", "maps"
TITLES = {
    PARAMETERS: "Three quarters of the parameters",
    KV: "Half of the keys and values",
    SOME_KV: "Keys and values of a quarter of the layers, in pairs that suit",
    MLP: "One mlp for all layers",
    MAPS: "Attention maps of the last four layers",
}


class Row(NamedTuple):
    """How a plan is made, and what of it learns."""

    group: str
    learn: str
    rates: tuple[float, ...]
    """Each is tried on as many tokens; what held-out windows of the training text like best counts."""
    odd: str = ""
    """What depth notation writes for every odd layer, `n` its number; empty for the layer itself."""
    first: str = ""
    """The same for every layer but the first."""
    transforms: tuple[tuple[str, dict[str, Any]], ...] = ()
    """Done one after the other."""
    dropped: float = 0.0
    """The share of the layers that is gone, those of the least block influence."""
    last: str = ""
    """What depth notation writes for the last four layers."""
    pairs: bool = False
    """Whether the transforms get the pairs of neighbours, a quarter of the layers, that lose least when they share."""
    without_readers: bool = False
    """Whether the second layers of these pairs have no attention."""


def _tied(start: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Two loops of half the layers, with changes of rank 64 beside every matrix of each run."""
    beside: dict[str, Any] = {"rank": 64}
    if start == "random":  # nothing of what was pretrained
        beside["start"] = "zero"
    elif start == "random, fitted":
        # the truncated singular values bring some of each layer's own matrix back
        beside["metric"] = "plain"
    return (("tie", {"pattern": "cycle", "start": start.partition(",")[0]}), ("relax", beside))


ROWS = {
    "a third of the layers dropped (ShortGPT)": Row(PARAMETERS, "all", (3e-4,), dropped=1 / 3),
    "low rank 128 in every second layer": Row(
        PARAMETERS, "plan", (1e-3, 3e-4), transforms=(("low-rank", {"rank": 128, "first": 1, "every": 2}),)
    ),
    "two loops, stepwise, rank 64 beside": Row(PARAMETERS, "plan", (1e-3, 3e-4), transforms=_tied("stepwise")),
    "two loops, average, rank 64 beside": Row(PARAMETERS, "plan", (1e-3, 3e-4), transforms=_tied("average")),
    "two loops, random, rank 64 at zero beside": Row(PARAMETERS, "plan", (1e-3, 3e-4), transforms=_tied("random")),
    "two loops, random, fitted rank 64 beside": Row(
        PARAMETERS, "plan", (1e-3, 3e-4), transforms=_tied("random, fitted")
    ),
    "CLA-2, aligned": Row(KV, "all:part=attention", (3e-4,), transforms=(("share-kv", {}),)),
    "CLA-2, average": Row(KV, "all:part=attention", (3e-4,), transforms=(("share-kv", {"how": "average"}),)),
    "CLA-2, the first's own": Row(KV, "all:part=attention", (3e-4,), transforms=(("share-kv", {"how": "first"}),)),
    "every second attention dropped": Row(KV, "all:part=attention", (3e-4,), odd="{n}m"),
    "values of layer 0 for all (SVFormer)": Row(KV, "all:part=attention", (3e-4,), first="{n}@v0"),
    "CLA in seven pairs of thirty, aligned": Row(
        SOME_KV, "all:part=attention", (3e-4,), transforms=(("share-kv", {}),), pairs=True
    ),
    "CLA in seven pairs of thirty, average": Row(
        SOME_KV, "all:part=attention", (3e-4,), transforms=(("share-kv", {"how": "average"}),), pairs=True
    ),
    "the attentions of the seven readers dropped": Row(SOME_KV, "all:part=attention", (3e-4,), without_readers=True),
    "one mlp for all, average": Row(
        MLP, "plan", (1e-3, 3e-4), transforms=(("tie", {"pattern": "all", "start": "average", "part": "mlp"}),)
    ),
    "layers dropped to as many parameters": Row(MLP, "all", (3e-4,), dropped=0.725),
    "maps of the one before them": Row(
        MAPS, "all:part=attention", (3e-4,), last="{n}", transforms=(("share-maps", {"span": "last four"}),)
    ),
    "their attentions dropped": Row(MAPS, "all:part=attention", (3e-4,), last="{n}m"),
}
LAST = 4
"""Layers at the end whose maps are shared."""
RANDOM, PRETRAINED = "two loops, random, rank 64 at zero beside", ("stepwise", "average")


def main() -> int:
    """Run what the journal lacks, print, and write the page if asked; the exit status says if the target is met."""
    args = _arguments()
    loaded = opened(args)
    size: dict[str, Any] = {"length": args.window, "limit": args.windows}
    texts = {
        "test": text_of(loaded, args.test, split="test", **size),
        "second": text_of(loaded, args.second_text, split="test", **size),
    }
    known = {row["row"]: row for row in read_objects(args.journal) if row}
    names = [name for name in ("dense", *ROWS) if not args.only or any(one in name for one in args.only)]
    for number, name in enumerate(names, 1):
        if name not in known:
            say(f"{number} of {len(names)}: {name}")
            known[name] = _row(loaded, name, texts, args)
            append_line(args.journal, known[name])
        say(json.dumps(known[name]))
    rows = [known[name] for name in ("dense", *ROWS) if name in known]
    if args.page is not None:
        args.page.write_text(_page(args, loaded, rows), encoding="utf-8", newline="\n")
    after = {name: known.get(name, {}).get("after", {}).get("test", float("inf")) for name in ROWS}
    starts = {start: after[f"two loops, {start}, rank 64 beside"] / after[RANDOM] for start in PRETRAINED}
    return finish(
        "equal_size", args, target=dict.fromkeys(PRETRAINED, 1.0), value=starts, figures={"rows": rows},
        device=device_of(loaded.model),
    )  # fmt: skip


def _row(loaded: Loaded, name: str, texts: dict[str, Data], args: argparse.Namespace) -> dict[str, Any]:
    if name == "dense":
        found = {text: round(perplexity(loaded.model, data, batch=args.batch).value, 3) for text, data in texts.items()}
        return {"row": name, "group": "", **_sizes(loaded, Plan.identity(loaded.opened.spec), {}), "before": found}
    row, wall = ROWS[name], time.monotonic()
    made = _made(loaded, row, args)
    fitted = round(time.monotonic() - wall, 1)
    before = _judged(loaded, made, texts, args)
    cpu = time.process_time()
    tried = {
        rate: heal(
            loaded, made.plan, "logit-kd", weights=made.weights, tokens=tokens_of(args.tokens),
            settings={"learn": row.learn, "rate": rate}, data=args.train, watch=args.second_text, length=args.length,
            held=args.held, batch=args.batch, seed=args.seed, say=say,
        )
        for rate in args.rates or row.rates
    }  # fmt: skip
    rate = min(tried, key=lambda one: tried[one].stages[-1]["held_after"])
    healed = tried[rate]
    seconds = {"fitted": fitted, "training": round(healed.seconds, 1), "cpu": round(time.process_time() - cpu, 1)}
    after = Transformed(healed.plan, dict(healed.weights))
    return {
        "row": name, "group": row.group, "learn": row.learn, "rate": rate,
        "tokens": healed.tokens,
        **_sizes(loaded, made.plan, made.weights), "before": before, "after": _judged(loaded, after, texts, args),
        **seconds, "plan": str(made.plan), "disjoint": disjoint(loaded, texts, args),
    }  # fmt: skip


def _made(loaded: Loaded, row: Row, args: argparse.Namespace) -> Transformed:
    """The plan of a row with its tensors, fitted on windows of the training text."""
    whole = Plan.identity(loaded.opened.spec, source=loaded.source)
    text = text_of(loaded, args.train, split="calibrate", length=args.length, limit=args.fit, seed=args.seed)
    pairs = _pairs(loaded, args) if row.pairs or row.without_readers else ()
    found = Transformed(parse_plan(_notation(row, whole.depth(), pairs), whole), {})
    if row.dropped:
        scores = get("measures", "block-influence").load()(loaded.model, text)
        order = sorted(range(whole.depth()), key=lambda layer: scores.values[layer])
        found = Transformed(drop(whole, order[: round(whole.depth() * row.dropped)]), {})
    for name, settings in row.transforms:
        own = dict(settings)
        if row.pairs:
            own["pairs"] = "+".join(f"{source}-{reader}" for source, reader in pairs)
        if "span" in own:
            own["span"] = f"{whole.depth() - LAST}-{whole.depth() - 1}"
        job = Job(loaded.model, text, found.plan, found.weights, found.plan.stack_name(), args.batch)
        found = get("transforms", name).load()(job, **own)
    return found


def _notation(row: Row, depth: int, pairs: tuple[tuple[int, int], ...]) -> str:
    """The plan in front of all transforms."""
    readers = {reader for _, reader in pairs} if row.without_readers else set()
    found = []
    for n in range(depth):
        how = "{n}m" if n in readers else row.odd if row.odd and n % 2 else row.first if row.first and n else "{n}"
        found.append((row.last if row.last and n >= depth - LAST else how).format(n=n))
    return ",".join(found)


_PAIRS: list[tuple[tuple[int, int], ...]] = []
"""The pairs, once they are known."""


def _pairs(loaded: Loaded, args: argparse.Namespace) -> tuple[tuple[int, int], ...]:
    """(source, reader) as the method aligned-kv chooses them on the training text, for a quarter of the layers."""
    if not _PAIRS:
        text = {"data": args.train, "length": args.length, "limit": args.fit, "seed": args.seed}
        quarter = loaded.opened.spec.stack().depth // 4
        found = prune(loaded, method="aligned-kv", drop=quarter, writable=False, **text)
        steps = runs(found.plan.steps())
        _PAIRS.append(tuple((run.kv.read, run.layer) for run in steps if run.kv.read is not None))
    return _PAIRS[0]


def _sizes(loaded: Loaded, plan: Plan, weights: Any) -> dict[str, int]:
    priced = cost(plan, loaded.opened.spec, weights=shapes_of(weights))
    return {"params": priced.params, "kv": priced.kv_per_token}


def _judged(loaded: Loaded, made: Transformed, texts: dict[str, Data], args: argparse.Namespace) -> dict[str, float]:
    with running(loaded.model, made.plan, made.weights):
        return {text: round(perplexity(loaded.model, data, batch=args.batch).value, 3) for text, data in texts.items()}


def _page(args: argparse.Namespace, loaded: Loaded, rows: list[dict[str, Any]]) -> str:
    """The tables in Markdown, best after distillation first."""
    dense = next((row for row in rows if row["row"] == "dense"), None)
    head = (
        "# At equal size: ties, shared keys, values and maps, low rank, dropping\n\n"
        "<!-- Generated by benchmarks/equal_size.py; do not edit. -->\n\n"
        f"`{loaded.source}`, float32, {args.threads} thread. Fitted on {args.fit} windows of {args.length} tokens of "
        f"`{Path(args.train).name}`, then distilled from the whole model on {tokens_of(args.tokens):,} tokens of it "
        f"(KL of the next token, {args.batch} windows a step, seed {args.seed}; where two rates were tried, the table "
        "has the one that held-out windows liked better). "
        f"Perplexity over {args.windows} windows of {args.window} tokens of `{Path(args.test).name}` and of "
        f"`{Path(args.second).name}`, of which nothing was read before. "
        f"{datetime.now(UTC):%Y-%m-%d}.\n"
    )
    if dense is not None:
        whole = f"{dense['params']:,} parameters, {dense['kv']:,} values of KV a token"
        head += f"\nThe whole model: {whole}, {dense['before']['test']:.2f} and {dense['before']['second']:.2f}.\n"
    groups = {group: [row for row in rows if row["group"] == group] for group in TITLES}
    return head + "".join(_table(group, own) for group, own in groups.items() if own)


def _table(group: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| {row['row']} | {row['params']:,} | {row['kv']:,} | {row['before']['test']:,.1f} | "
        f"{row['before']['second']:,.1f} | {row['after']['test']:,.1f} | {row['after']['second']:,.1f} | "
        f"`{row['learn']}` | {row['rate']:g} | {row['cpu']:.0f} |"
        for row in sorted(rows, key=lambda row: row["after"]["test"])
    ]
    columns = (
        "| plan | parameters | KV values a token | first text | second text | distilled: first | second | learns | "
        "rate | CPU seconds |\n|---|---:|---:|---:|---:|---:|---:|---|---:|---:|"
    )
    return "\n".join([f"\n## {TITLES[group]}\n", columns, *lines]) + "\n"


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, pairs=1)
    training_options(parser, windows=12)
    parser.add_argument("--fit", type=int, default=16, help="windows to fit on (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", help="rates to try (default: those of each row)")
    return trained_rows(parser, "distillation")


if __name__ == "__main__":
    raise SystemExit(main())
