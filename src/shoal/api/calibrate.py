"""calibrate: thresholds for exits that keep a promise, and a table of what others would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shoal._version import __version__
from shoal.api.assess import Source, opened_base, text_of
from shoal.api.exit_options import Exits, exit_options, held_to
from shoal.api.exit_table import finite, notes, row
from shoal.api.risk_control import ControlledRisk, Settings, control_risk
from shoal.atomic import write_atomically
from shoal.data import Data
from shoal.deciding.exit_units import require_units
from shoal.deciding.policies.calibrated import Calibrated
from shoal.deciding.policy import Policy
from shoal.deciding.policy_file import Level, PolicyFile
from shoal.deciding.policy_text import make_policy
from shoal.errors import UsageError
from shoal.evaluation.exit_search import Target, one_threshold, parse_target, search_path, thin
from shoal.evaluation.exit_tradeoff import trade_off
from shoal.evaluation.exits import Features, live_losses, load_features, record_exits, require_length
from shoal.evaluation.risk import Bound, Losses, require_confidence, require_sequences
from shoal.evaluation.scoring import Progress
from shoal.evaluation.staged import require_tradeoffs
from shoal.executing.weights import Tensors, hash_of_used, plan_and_weights
from shoal.models.kinds import require_causal
from shoal.models.load import Loaded
from shoal.plan import Given, Plan
from shoal.plan.price import head_in_layers
from shoal.record import command_line, environment, plain
from shoal.report.calibration import render_calibration

Guarantee = Literal["fixed-sequence", "conformal"]
Check = Literal["auto", "recorded", "live"]
LIVE_POINTS = 6
"""Settings at most that are tested by running the policy itself."""


@dataclass(frozen=True)
class Calibration:
    """What was chosen, what it costs, and what else could be had."""

    file: PolicyFile
    promises: tuple[ControlledRisk, ...]
    table: tuple[dict[str, Any], ...]
    """The settings of the first target's search, from the safest on."""
    uniform: tuple[dict[str, Any], ...]
    """The same threshold at every exit, for comparison."""
    notes: tuple[str, ...]
    tradeoffs: tuple[dict[str, Any], ...] = ()
    """The settings that make a weighted sum of disagreement and cost small, by growing weight."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = plain(
            {
                "policy": self.file.to_dict(),
                "promises": [asdict(one) for one in self.promises],
                "table": list(self.table),
                "uniform": list(self.uniform),
                "notes": list(self.notes),
                "tradeoffs": list(self.tradeoffs),
            }
        )
        return found


def calibrate(
    source: Source,
    policy: str = "exit",
    *,
    plan: Given | None = None,
    weights: Tensors | None = None,
    targets: Sequence[str] = ("agreement=0.95",),
    tradeoffs: Sequence[float] = (),
    confidence: float = 0.9,
    guarantee: Guarantee = "fixed-sequence",
    bound: Bound = "hoeffding-bentkus",
    check: Check = "auto",
    cap: float = 1.0,
    count_heads: bool = False,
    points: int = 24,
    data: Any = "builtin",
    split: str = "calibrate",
    length: int = 128,
    prompt: int = 32,
    limit: int = 200,
    batch: int = 1,
    seed: int = 0,
    features: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Calibration:
    """Choose a threshold for each exit of `policy` (exit with its options, without after and confidence) so that each
    of the `targets` holds with `confidence`, on sequences like those of `data`.

    Half of `limit` sequences of `length` tokens, drawn with `seed`, choose the settings; the other half test them.
    Columns from `prompt` on count as generated. `check`: "recorded" tests on the exits recorded in one pass of the
    whole plan, which holds for keys and values of the whole plan (fill=defer); "live" runs the policy with its own fill
    for every tested setting; "auto" is live for every fill but defer. `tradeoffs`: a level without a promise for each
    weight w, whose thresholds make w (1 - agreement) + (1 - w) cost small (DyCE, `trade_off`). `features`: a file of
    recorded exits, read when it is there and written otherwise. `options` go to `shoal.load`. Raises U600 to U603, U607
    and U700 for what cannot be promised or calibrated, D470 for too few sequences, D471 for too short ones, D472 and
    D473 for other features.
    """
    delta = require_confidence(confidence)
    wanted = tuple(parse_target(text, cap) for text in targets)
    require_tradeoffs(tradeoffs)
    exits = exit_options(policy)
    require_length(length, prompt)
    for target in wanted:
        require_sequences(limit - limit // 2, target.limit, delta if guarantee == "fixed-sequence" else None)
    loaded = opened_base(source, **options)
    require_causal(loaded.model, "calibrate")
    spec = loaded.opened.spec
    identity = Plan.identity(spec)
    whole, weights = plan_and_weights(identity if plan is None else plan, identity, weights)
    exits = held_to(exits, whole)
    gated = make_policy(exits.text, whole, spec).plan
    require_units(gated, weights or {}, exits.by)
    text = text_of(loaded, data, split=split, length=length, limit=limit, seed=seed)
    found = _recorded(loaded, gated, text, prompt, weights, batch, progress, features)
    order = np.random.default_rng(seed).permutation(len(text))
    choose, test = order[: len(text) // 2], order[len(text) // 2 :]
    for target in wanted:
        require_sequences(len(test), target.limit, delta if guarantee == "fixed-sequence" else None)
    head = head_in_layers(spec)
    settings = Settings(delta, guarantee, bound, exits.by, head if count_heads else 0.0, points)
    live = check == "live" or (check == "auto" and exits.fill != "defer")
    chosen, held = found.only(choose), found.only(test)

    def running_losses(target: Target, thresholds: Sequence[float]) -> tuple[Losses, float]:
        one = _policy(gated, Level("tested", finite(found, thresholds)), exits)
        means, deep = live_losses(
            loaded.model, one, gated, text.only(test.tolist()), held, weights=weights, batch=batch,
            nats=target.kind == "loss", progress=progress,
        )  # fmt: skip
        return target.scaled(means), deep

    promises = tuple(
        control_risk(chosen, held, target, settings, live=running_losses if live else None, points=LIVE_POINTS)
        for target in wanted
    )
    path = thin(search_path(chosen, wanted[0], exits.by, head=settings.head), points)
    shown = [(one.thresholds for one in own) for own in (path, one_threshold(chosen, wanted[0], exits.by))]
    table, uniform = (
        tuple(row(found, held, wanted[0], exits.by, own, head, number) for number, own in enumerate(rows))
        for rows in shown
    )
    asked = sorted(set(tradeoffs))
    traded = tuple(
        row(found, held, wanted[0], exits.by, thresholds, head, f"tradeoff={weight:g}")
        for weight, thresholds in zip(asked, trade_off(chosen, exits.by, asked, head=settings.head), strict=True)
    )
    made = {
        "data": asdict(text.info),
        "prompt": prompt,
        "check": "live" if live else "recorded",
        "guarantee": guarantee,
        "bound": bound if guarantee == "fixed-sequence" else None,
        "environment": environment(),
    }
    levels = (*(_level(found, one) for one in promises), *map(_unpromised, traded), *map(_unpromised, table))
    file = PolicyFile(
        spec.family, whole.base.fingerprint, whole.hash, levels, exits.by, exits.head, exits.fill, exits.prefill,
        hash_of_used(gated, weights), made,
    )  # fmt: skip
    return Calibration(file, promises, table, uniform, notes(promises, live, exits, head, found.depths[-1]), traded)


def publish(found: Calibration, path: str | Path, *, title: str) -> None:
    """Write the page with the curve, the promises and the table."""
    made = found.file.made
    facts = {
        "text": f"{made['data']['source']}, {made['data']['count']} sequences of {made['data']['length']} tokens",
        "prompt": f"{made['prompt']} tokens",
        "test": f"{made['guarantee']}, {made['bound'] or 'no bound'}, on {made['check']} exits",
        "signal": found.file.by,
        "fill": found.file.fill,
    }
    page = render_calibration(
        found.to_dict() | {"title": title, "facts": facts, "command": " ".join(command_line()), "version": __version__}
    )
    write_atomically(path, page)


def _recorded(
    loaded: Loaded,
    gated: Plan,
    text: Data,
    prompt: int,
    weights: Tensors | None,
    batch: int,
    progress: Progress | None,
    path: str | Path | None,
) -> Features:
    if path is not None and Path(path).exists():
        found = load_features(path)
        same = found.made["plan"] == gated.hash and found.made["data"]["sha256"] == text.info.sha256
        same = same and found.made.get("weights") == hash_of_used(gated, weights)
        if not same or found.made["fingerprint"] != gated.base.fingerprint or found.prompt != prompt:
            raise UsageError(
                f"{path} was recorded with another model, plan, lens, text or prompt; name another file to record anew",
                code="D473",
            )
        return found
    found = record_exits(loaded.model, gated, text, prompt=prompt, weights=weights, batch=batch, progress=progress)
    if path is not None:
        found.save(path)
    return found


def _policy(gated: Plan, level: Level, exits: Exits) -> Policy:
    return Calibrated(gated, (level,), exits.by, exits.prefill)


def _level(features: Features, one: ControlledRisk) -> Level:
    found = {key: value for key, value in asdict(one).items() if key not in ("target", "thresholds", "layers")}
    return Level(one.target, finite(features, one.thresholds), one.promised, one.layers, plain(found))


def _unpromised(row: dict[str, Any]) -> Level:
    thresholds = {int(layer): value for layer, value in row["thresholds"].items()}
    name = row["setting"]
    return Level(f"setting-{name}" if isinstance(name, int) else name, thresholds, False, row["layers"])
