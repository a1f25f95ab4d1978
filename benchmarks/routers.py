"""Learned routers against static plans of the same mean depth, after as much training.

Each router recipe of `shoal heal` trains on --tokens of the training text at its own defaults, but for --target, the
share of the depth where it has such an option. Then --tests say how good it is, and its trace on them how deep tokens
went, layers a token. Its static rivals are the plans of as many layers, rounded, without those of the least block
influence, that learn on as many tokens with LoRA: by distillation (logit-kd) and by labels (lora). What a router
skips for some tokens of a call only is masked here and not saved: speed is simulated and not in the table. Each
finished row is a line of --journal, and the same command goes on after a stop; --page renders the journal, winners and
losers.

Target: a router beats the static plan of its depth on the second text, on which nothing was trained.

    python benchmarks/routers.py --train wikitext-2-valid.txt --test wikitext-2-raw-test.txt \\
        --second lambada_openai.jsonl --text-key context --tokens 12k --journal routers.jsonl --page routers.md
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from _common import disjoint, finish, journalled, opened, options, say, trained_rows, training_options

from shoal.api.assess import text_of
from shoal.api.heal import Healed, heal
from shoal.cli.heal import tokens_of
from shoal.data import Data
from shoal.evaluation import perplexity
from shoal.live import running
from shoal.models.calls import device_of
from shoal.models.load import Loaded
from shoal.plan import Plan, drop
from shoal.registry import entries, get

RIVALS = ("logit-kd", "lora")
"""How static plans learn."""
SHARES = ("target", "most", "capacity")
"""Options of recipes that say the share of the depth."""


def main() -> int:
    """Run what the journal lacks, print, and write the page if asked; the exit status says if the target is met."""
    args = _arguments()
    loaded = opened(args)
    size: dict[str, Any] = {"length": args.window, "limit": args.windows}
    texts = {
        "test": text_of(loaded, args.test, split="test", **size),
        "second": text_of(loaded, args.second_text, split="test", **size),
    }
    rows: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(_router, loaded, name, texts, args) for name in args.recipe or _recipes()
    }
    found = journalled(args, rows)
    whole = loaded.opened.spec.stack().depth
    depths = sorted({_depth(row) for row in found.values()} - {whole})
    found |= journalled(
        args,
        {
            _static_name(depth, recipe): partial(_static, loaded, depth, recipe, texts, args)
            for depth in depths
            for recipe in RIVALS
        },
    )
    if args.page is not None:
        args.page.write_text(_page(args, loaded, found), encoding="utf-8", newline="\n")
    wins = {
        name: min(rival["second"] for rival in _rivals(found, row)) / row["second"]
        for name, row in found.items()
        if "static" not in name and _depth(row) != whole
    }
    return finish(
        "routers", args, target=dict.fromkeys(wins, 1.0), value=wins, figures={"rows": list(found.values())},
        device=device_of(loaded.model),
    )  # fmt: skip


def _recipes() -> list[str]:
    """Those whose policy still decides when they are done."""
    found = []
    for name, entry in entries("recipes").items():
        stages = entry.load()()
        if any(getattr(stage, "policy", "").startswith("routed") for stage in stages) and name != "fold-gates":
            found.append(name)
    return sorted(found)


def _router(loaded: Loaded, name: str, texts: dict[str, Data], args: argparse.Namespace) -> dict[str, Any]:
    share = {key: args.target for key in SHARES if key in get("recipes", name).options()}
    return _row(loaded, name, Plan.identity(loaded.opened.spec, source=loaded.source), name, share, texts, args)


def _static(
    loaded: Loaded, depth: int, recipe: str, texts: dict[str, Data], args: argparse.Namespace
) -> dict[str, Any]:
    text = text_of(loaded, args.train, split="calibrate", length=args.length, limit=16, seed=args.seed)
    scores = get("measures", "block-influence").load()(loaded.model, text)
    whole = Plan.identity(loaded.opened.spec, source=loaded.source)
    gone = sorted(range(whole.depth()), key=lambda layer: scores.values[layer])[: whole.depth() - depth]
    return _row(loaded, _static_name(depth, recipe), drop(whole, gone), recipe, {}, texts, args)


def _static_name(depth: int, recipe: str) -> str:
    return f"{depth} layers, static, {recipe}"


def _row(
    loaded: Loaded, name: str, plan: Plan, recipe: str, settings: dict[str, Any], texts: dict[str, Data],
    args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    say(f"{name}: {recipe} {settings}")
    cpu = time.process_time()
    healed = heal(
        loaded, plan, recipe, settings=settings, tokens=tokens_of(args.tokens), data=args.train,
        watch=args.second_text, length=args.length, held=args.held, batch=args.batch, seed=args.seed, say=say,
    )  # fmt: skip
    seconds = round(time.process_time() - cpu, 1)
    return {
        "row": name, "recipe": recipe, "settings": settings, "tokens": healed.tokens,
        **_judged(loaded, healed, texts, args), "cpu": seconds, "disjoint": disjoint(loaded, texts, args),
    }  # fmt: skip


def _judged(loaded: Loaded, healed: Healed, texts: dict[str, Data], args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity on both texts, and layers a token on them."""
    weights, policy = dict(healed.weights), healed.policy or None
    with running(loaded.model, healed.plan, weights, policy=policy) as handle:
        found: dict[str, Any] = {
            text: round(perplexity(loaded.model, data, batch=args.batch).value, 3) for text, data in texts.items()
        }
        counts = None if handle.policy is None else handle.trace.counts
        layers = float(len(healed.plan.layers())) if counts is None else counts.asked / counts.tokens
    return {**found, "layers": round(layers, 3), "plan": str(healed.plan), "policy": policy}


def _depth(row: dict[str, Any]) -> int:
    """Of the static plans that it is compared with."""
    return math.floor(row["layers"] + 0.5)


def _rivals(found: dict[str, dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    return [found[_static_name(_depth(row), recipe)] for recipe in RIVALS]


def _page(args: argparse.Namespace, loaded: Loaded, found: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown, the best on the second text first."""
    head = (
        "# Routers and static plans\n\n"
        "<!-- Generated by benchmarks/routers.py; do not edit. -->\n\n"
        f"`{loaded.source}` of {loaded.opened.spec.stack().depth} layers, {args.threads} thread. Each router recipe at "
        f"its defaults, with a share of {args.target:g} of the depth where it has such an option, on "
        f"{tokens_of(args.tokens):,} tokens of `{Path(args.train).name}` ({args.batch} x {args.length} tokens a "
        f"step, seed {args.seed}); static plans lack the layers of the least block influence and learn on as many "
        f"tokens by `logit-kd` and by `lora` (labels). Perplexity over {args.windows} windows of {args.window} tokens "
        f"of `{Path(args.test).name}` and "
        f"of `{Path(args.second).name}`, of which nothing was read before. Layers a token are counted; what they would "
        f"save is not measured. {datetime.now(UTC):%Y-%m-%d}.\n\n"
        "| plan | layers a token | first text | second text | beats the static plans of its depth | CPU seconds |\n"
        "|---|---:|---:|---:|---|---:|\n"
    )
    lines = []
    for name, row in sorted(found.items(), key=lambda pair: pair[1]["second"]):
        verdict = ""
        if "static" not in name:
            if _depth(row) == loaded.opened.spec.stack().depth:
                verdict = "skips nothing"
            else:
                rivals = _rivals(found, row)
                beaten = [text for text in ("test", "second") if row[text] < min(rival[text] for rival in rivals)]
                words = {("test", "second"): "on both texts", ("test",): "on the first", ("second",): "on the second"}
                verdict = words.get(tuple(beaten), "no")
        figures = f"{row['layers']:.2f} | {row['test']:,.2f} | {row['second']:,.2f}"
        lines.append(f"| `{name}` | {figures} | {verdict} | {row['cpu']:.0f} |")
    return head + "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = options(__doc__, pairs=1)
    training_options(parser, windows=12)
    parser.add_argument("--target", type=float, default=0.8, help="share of the depth (default: %(default)s)")
    parser.add_argument("--recipe", action="append", help="router recipe; again for more (default: all)")
    return trained_rows(parser, "training")


if __name__ == "__main__":
    raise SystemExit(main())
