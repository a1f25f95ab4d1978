"""Does the promise hold? Exits are recorded once; then, many times over, one random part of the sequences calibrates
and the rest is held out. One JSON object is printed.

In each resampling `shoal calibrate` sees --calibrate sequences (half choose the settings, half test them), and the
agreement with the full model is measured on the held-out ones under the chosen thresholds. A promise of confidence
1 - delta may fail in a share of about delta of the resamplings; `held` counts those in which the held-out mean is at
least what was promised. `held_in_pool` asks the same of all sequences that were not used to choose the settings or to
test them and of those that were, which is a less noisy stand-in for the true mean. Conformal rows promise an average
only and are not judged.

Teacher-forced, with the keys and values of the full model (the fill defer): free generation is not promised anything.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import say

from shoal.api.risk_control import Settings, control_risk
from shoal.data import load_data
from shoal.deciding.policy_text import make_policy
from shoal.evaluation.exit_search import Target, losses, parse_target, replay
from shoal.evaluation.exits import Features, load_features, record_exits
from shoal.fitting.lens import fit_lenses
from shoal.fitting.probe import fit_probes
from shoal.models.compat import hide_own_bars
from shoal.models.inspect import inspect
from shoal.models.load import load
from shoal.plan import Plan
from shoal.record import environment

SHARE = 0.95
"""Of the resamplings in which a promise must hold; meant for a delta of at most 0.1."""


def recorded(args: argparse.Namespace) -> Features:
    """From --features if it is there; otherwise made and, if asked for, written."""
    if args.features is not None and args.features.exists():
        return load_features(args.features)
    hide_own_bars()
    torch.set_num_threads(args.threads)
    loaded = load(args.model, device=args.device, dtype="float32")
    spec = inspect(loaded.model)
    head = "lens" if args.lens else "base"
    plan = make_policy(f"exit:confidence=1,layers={args.layers},head={head}", Plan.identity(spec), spec).plan
    data = load_data(
        args.data, loaded.tokenizer, length=args.length, limit=args.sequences + args.lens, split="whole", seed=args.seed
    )
    if len(data) < args.sequences + args.lens:
        raise SystemExit(f"{args.data} has {len(data)} sequences, not {args.sequences + args.lens}")
    weights = {}
    if args.lens:
        say(f"fitting lenses on {args.lens} other sequences")
        others = data.only(range(args.sequences, len(data)))
        weights = fit_lenses(loaded.model, plan, None, others, batch=args.batch)
        weights |= fit_probes(loaded.model, plan, weights, others, batch=args.batch)
    began = time.monotonic()
    found = record_exits(
        loaded.model, plan, data.only(range(args.sequences)), prompt=args.prompt, weights=weights, batch=args.batch,
        progress=lambda done, total, _: say(f"recorded {done} of {total}, {time.monotonic() - began:.0f} s"),
    )  # fmt: skip
    if args.features is not None:
        found.save(args.features)
    return found


def resampled(found: Features, target: Target, settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    """What came of the promise in --resamplings random divisions."""
    rng = np.random.default_rng(args.seed)
    held, pooled, promised, outside, layers = 0, 0, 0, [], []
    for _ in range(args.resamplings):
        order = rng.permutation(len(found.counted))
        half = args.calibrate // 2
        choose, test, rest = order[:half], order[half : args.calibrate], order[args.calibrate :]
        one = control_risk(found.only(choose), found.only(test), target, settings)
        out = found.only(rest)
        again = replay(out, settings.by, one.thresholds)
        risk = float(losses(out, target, again.left).mean())
        whole = float(losses(found, target, replay(found, settings.by, one.thresholds).left).mean())
        held += risk <= target.limit
        pooled += whole <= target.limit
        promised += one.promised
        outside.append(target.shown(risk))
        layers.append(again.layers)
    return {
        "target": target.name,
        "confidence": 1 - settings.delta,
        "guarantee": settings.guarantee,
        "bound": settings.bound if settings.guarantee == "fixed-sequence" else None,
        "by": settings.by,
        "resamplings": args.resamplings,
        "held": held,
        "held_in_pool": pooled,
        "promised": promised,
        "held_out": _spread(outside),
        "layers": _spread(layers),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "lowest": min(values),
        "median": float(np.median(values)),
        "highest": max(values),
        "mean": float(np.mean(values)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="smollm2", help="what shoal.load takes (default: %(default)s)")
    parser.add_argument("--data", default="builtin", help="as --data of shoal calibrate (default: %(default)s)")
    parser.add_argument("--layers", default="22,25,27,28", help="exits behind these layers (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=150, help="in all (default: %(default)s)")
    parser.add_argument("--calibrate", type=int, default=100, help="of them in each resampling (default: %(default)s)")
    parser.add_argument("--lens", type=int, default=0, help="fit lenses and probes on as many others (default: none)")
    parser.add_argument("--length", type=int, default=36, help="tokens in a sequence (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=8, help="of them prompt (default: %(default)s)")
    parser.add_argument("--target", action="append", help="default: agreement=0.9 and agreement=0.95")
    parser.add_argument("--delta", type=float, action="append", help="default: 0.05 and 0.1")
    parser.add_argument("--by", action="append", help="signals (default: probability, certainty, fitted probes)")
    parser.add_argument("--resamplings", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--features", type=Path, help="recorded exits: read if there, else written")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = recorded(args)
    rows = []
    for text in args.target or ["agreement=0.9", "agreement=0.95"]:
        for delta in args.delta or [0.05, 0.1]:
            for by in args.by or ["probability", "certainty", *(["probe"] if args.lens else [])]:
                for guarantee, bound in (
                    ("fixed-sequence", "hoeffding-bentkus"), ("fixed-sequence", "betting"), ("conformal", "betting"),
                ):  # fmt: skip
                    settings = Settings(delta, guarantee, bound, by)  # type: ignore[arg-type]
                    rows.append(resampled(found, parse_target(text), settings, args))
                    row = rows[-1]
                    say(f"{text} {delta} {by} {guarantee} {bound}: {row['held']} held, {row['layers']['mean']:.2f}")
    judged = [row["held"] / row["resamplings"] for row in rows if row["guarantee"] == "fixed-sequence"]
    passed = min(judged) >= SHARE and any(row["promised"] for row in rows)
    text = {
        "target": f"the promised target holds on held-out sequences in at least {SHARE:.0%} of the resamplings",
        "value": min(judged),
        "passed": passed,
        "figures": rows,
        "recorded": {"made": found.made, "depths": found.depths, "prompt": found.prompt},
        "environment": environment(),
    }
    print(json.dumps(text, indent=1))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
