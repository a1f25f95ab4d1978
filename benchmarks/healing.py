"""What each healing recipe wins back of one cut: perplexity on text like that of the training and on another.

Every recipe with its defaults, once at `--tokens` and once at `--seconds` of CPU time for all, which the pace of the
first run turns into tokens; `--run RECIPE=TOKENS` adds runs of one's own. Training text and test text share no 64
tokens (compared by hash). Each finished run is a line of `--journal`, and the same command goes on after a stop;
`--page` renders the journal as a table. Two rows need no training: the cut plan, and the plan after `refit`.

Target: at equal tokens the default recipe is below `refit` on both texts.

    python benchmarks/healing.py --train wikitext-2-valid.txt --test wikitext-2-raw-test.txt \\
        --second lambada_openai.jsonl --text-key context --tokens 12k --seconds 300 --journal healing.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _common import disjoint, finish, opened, options, say, training_options

from shoal.api.assess import text_of
from shoal.api.heal import heal
from shoal.cli.heal import tokens_of
from shoal.data import Data
from shoal.data.spelled import keyed
from shoal.evaluation import generation_check, perplexity
from shoal.fitting.result import Job
from shoal.live import running
from shoal.models.calls import device_of
from shoal.models.load import Loaded
from shoal.plan import Plan, parse_plan
from shoal.record import append_line, read_objects
from shoal.registry import entries, get

CUT = "0-2,4-12,15-16,18-24,27-29"
"""The six layers of ShortGPT (lowest block influence) are gone: 0.8 of the depth."""
DEFAULT, CLOSED_FORM = "logit-kd", "refit"
TEXTS = ("test", "second")


def main() -> int:
    """Run what the journal lacks, print, and write the page if asked; the exit status says if the target is met."""
    args = _arguments()
    loaded = opened(args)
    plan = parse_plan(args.plan, Plan.identity(loaded.opened.spec, source=loaded.source))
    texts = {
        "test": text_of(loaded, args.test, split="test", length=args.window, limit=args.windows),
        "second": text_of(
            loaded, keyed(args.second, args.text_key, None), split="test", length=args.window, limit=args.windows
        ),
    }
    known = {row["run"]: row for row in read_objects(args.journal) if row}
    for number, (name, how) in enumerate(runs := list(_runs(args)), 1):
        if name not in known:
            say(f"{number} of {len(runs)}: {name}")
            known[name] = _row(loaded, plan, name, _amount(how, known, args), texts, args)
            append_line(args.journal, known[name])
        say(json.dumps({key: value for key, value in known[name].items() if key not in ("curve", "stages")}))
    rows = [known[name] for name, _ in runs]
    if args.page is not None:
        args.page.write_text(_page(args, loaded, rows), encoding="utf-8", newline="\n")
    best = next((row for row in rows if row["run"] == f"{DEFAULT} {args.tokens}"), None)
    ratios = {text: best[text] / known[CLOSED_FORM][text] if best else float("inf") for text in TEXTS}
    return finish(
        "healing",
        args,
        target=dict.fromkeys(TEXTS, 1.0),
        value=ratios,
        figures={"rows": rows},
        device=device_of(loaded.model),
    )


def _runs(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of all runs, with what `heal` is told."""
    for name in ("dense", "cut", CLOSED_FORM):
        yield name, {}
    recipes = args.recipe if args.recipe is not None else sorted(entries("recipes"))
    for recipe in recipes:
        yield f"{recipe} {args.tokens}", {"recipe": recipe, "tokens": tokens_of(args.tokens)}
    if args.seconds:
        for recipe in recipes:
            pace = f"{recipe} {args.tokens}"
            yield f"{recipe} {args.seconds:g} s", {"recipe": recipe, "seconds": args.seconds, "pace_of": pace}
    for one in args.run:
        recipe, _, tokens = one.rpartition("=")
        yield f"{recipe} {tokens}", {"recipe": recipe, "tokens": tokens_of(tokens)}


def _amount(how: dict[str, Any], known: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """What `heal` is told: of a run of so many seconds their tokens."""
    if "seconds" not in how:
        return how
    return {"recipe": how["recipe"], "tokens": _tokens_in(how["seconds"], known[how["pace_of"]], args)}


def _tokens_in(seconds: float, row: dict[str, Any], args: argparse.Namespace) -> int:
    """How many tokens a recipe trains on in so many CPU seconds, by a run of it; what it fits in closed form takes as
    long whatever comes after. At least one step."""
    fitted = sum(stage["seconds"] for stage in row["stages"] if "transform" in stage)
    fitted *= row["cpu"] / row["seconds"]
    tokens = row["tokens"] * (seconds - fitted) / (row["cpu"] - fitted)
    return max(int(tokens), args.batch * args.length)


def _row(
    loaded: Loaded, plan: Plan, name: str, how: dict[str, Any], texts: dict[str, Data], args: argparse.Namespace
) -> dict[str, Any]:
    """One run, and what both texts and greedy text say of it."""
    wall, cpu = time.monotonic(), time.process_time()
    made, weights, more = plan, {}, dict[str, Any]()
    if how:
        healed = heal(
            loaded, plan, data=args.train, watch=args.second_text, length=args.length, held=args.held, batch=args.batch,
            seed=args.seed, say=say, **how,
        )  # fmt: skip
        made, weights = healed.plan, dict(healed.weights)
        more = {"tokens": healed.tokens, "training": round(healed.seconds, 1), "stages": list(healed.stages)}
    elif name == CLOSED_FORM:
        train = text_of(loaded, args.train, split="calibrate", length=args.length, limit=32, seed=args.seed)
        job = Job(loaded.model, train, plan, {}, plan.stack_name(), args.batch)
        fitted = get("transforms", CLOSED_FORM).load()(job)
        made, weights, more = fitted.plan, dict(fitted.weights), {"tokens": train.ids.numel()}
    seconds = {"seconds": round(time.monotonic() - wall, 1), "cpu": round(time.process_time() - cpu, 1)}
    apart = disjoint(loaded, texts, args) if how else True
    with nullcontext() if name == "dense" else running(loaded.model, made, weights):
        found = {text: round(perplexity(loaded.model, data, batch=args.batch).value, 3) for text, data in texts.items()}
        greedy = generation_check(loaded.model, loaded.tokenizer, new_tokens=args.new, chat=False)
    return {"run": name, **found, "repeated": round(greedy.repetition, 4), **more, **seconds, "disjoint": apart}


def _page(args: argparse.Namespace, loaded: Loaded, rows: list[dict[str, Any]]) -> str:
    """The table in Markdown, best on the second text first."""
    told = {row["run"]: row for row in rows}
    trained = sorted((row for row in rows if "training" in row), key=lambda row: row["second"])
    head = (
        "# Healing recipes, side by side\n\n<!-- Generated by benchmarks/healing.py; do not edit. -->\n\n"
        f"`{loaded.source}` under `{args.plan}`, float32, {args.threads} thread. Trained on windows of {args.length} "
        f"tokens of `{Path(args.train).name}`, {args.batch} a step, seed {args.seed}; perplexity over {args.windows} "
        f"windows of {args.window} tokens of `{Path(args.test).name}` and of `{Path(args.second).name}`, of which "
        "nothing was trained on. "
        "*Repeated* is the share of 4-grams of greedy text that occurred before in the same answer. Seconds are those "
        "of training, CPU seconds those of the whole run. Single runs with the recipes' own rates, "
        f"{datetime.now(UTC):%Y-%m-%d}.\n\n"
        "| run | tokens | first text | second text | repeated | seconds | CPU seconds |\n"
        "|---|---:|---:|---:|---:|---:|---:|\n"
    )
    lines = [
        f"| {row['run']} | {row.get('tokens', 0):,} | {row['test']:.2f} | {row['second']:.2f} | "
        f"{row['repeated']:.3f} | {row.get('training', row['seconds']):.0f} | {row['cpu']:.0f} |"
        for row in [*(told[name] for name in ("dense", "cut", CLOSED_FORM) if name in told), *trained]
    ]
    return head + "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, pairs=1)
    training_options(parser, windows=24)
    parser.add_argument("--plan", default=CUT, help="what is healed (default: %(default)s)")
    parser.add_argument("--recipe", action="append", help="again for more (default: every recipe)")
    parser.add_argument("--run", action="append", default=[], help="RECIPE=TOKENS, a run of one's own; again for more")
    parser.add_argument("--tokens", default="12k", help="of every recipe (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.0, help="of every recipe, in runs of their own (0: none)")
    parser.add_argument("--new", type=int, default=64, help="tokens of a greedy answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--journal", type=Path, default=Path("healing.jsonl"), help="finished runs, a line each")
    parser.add_argument("--page", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    args.second_text = keyed(args.second, args.text_key, None)
    return args


if __name__ == "__main__":
    raise SystemExit(main())
