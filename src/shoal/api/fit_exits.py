"""fit-exits: what exits need, fitted on text: lenses to be read well, probes to know when, decisions; a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from scipy.stats import mannwhitneyu

from shoal.api.assess import Source, opened_base, text_of
from shoal.api.exit_options import exit_options
from shoal.data import Data
from shoal.deciding.gating import exits_of, ungated
from shoal.deciding.policy_text import make_policy
from shoal.errors import UsageError
from shoal.evaluation.exit_search import losses, parse_target, replay
from shoal.evaluation.exits import Features, record_exits, require_length
from shoal.evaluation.risk import sequence_means
from shoal.evaluation.scoring import Progress
from shoal.executing.weights import Tensors, plan_and_weights
from shoal.fitting.exits import ExitFit, fit_adainfer
from shoal.fitting.leave_or_stay import fit_leave_or_stay
from shoal.fitting.lens import fit_lenses
from shoal.fitting.probe import fit_probes
from shoal.models.kinds import require_causal
from shoal.models.load import Loaded
from shoal.plan import Given, Plan, Spec, format_steps
from shoal.plan.steps import decides
from shoal.record import plain
from shoal.spelling import read

What = Literal["lens", "leave-or-stay", "adainfer"]
NAME = "lens"
FIRST = 1
"""Columns that count as prompt where exits are judged: one, which has nothing to go by."""


@dataclass(frozen=True)
class FittedExits:
    """A plan with exits, their lenses, and what held-out text says of them."""

    plan: Plan
    weights: Tensors
    rows: tuple[dict[str, Any], ...]
    """For each exit on the held-out text: `agreement` with the whole plan's token and `rise` of the cross-entropy in
    nats, by the model's own head and through the lens; `ranked`: how often a token that the exit writes right has a
    higher probability, or probe, than one that it writes wrong."""
    sequences: int
    """Held out."""
    decided: dict[str, Any] | None = None
    """Of leave-or-stay on the held-out text: `agreement` with the whole plan and mean `layers`, where tokens leave as
    it decides, and its `cost`, W (1 - agreement) + (1 - W) layers / whole."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the tensors."""
        found: dict[str, Any] = plain(
            {
                "plan": format_steps(self.plan.steps()), "rows": list(self.rows), "sequences": self.sequences,
                "decided": self.decided,
            }
        )  # fmt: skip
        return found


def fit_exits(
    source: Source,
    policy: str = "exit",
    *,
    what: What = "lens",
    tradeoff: float | None = None,
    plan: Given | None = None,
    weights: Tensors | None = None,
    data: Any = "builtin",
    split: str = "calibrate",
    length: int = 128,
    limit: int = 256,
    batch: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> FittedExits | ExitFit:
    """Fit lenses (`fit_lenses`) and probes (`fit_probes`) for the exits of `policy` (exit with its options but after
    and confidence), lenses and what decides for the cost of `tradeoff` (`fit_leave_or_stay`; 0.5 if left out), or the
    classifier of the policy adainfer (`fit_adainfer`) for exits behind these layers.

    The last fifth of `limit` sequences of `length` tokens is held out and judges what was fitted. The plan that comes
    back holds the exits; written with `save_planned`, it runs by `--plan FOLDER --policy exit:confidence=0.9`, and
    `shoal calibrate --plan FOLDER --policy exit:by=probe` chooses its thresholds. `options` go to `shoal.load`. Raises
    U603 for another policy, U621 for a plan that has exits already or a classifier beside a plan, U622 for several
    residual streams, U699 for a tradeoff outside [0, 1] or without leave-or-stay, U625 and D471 for too little text,
    D414 for labels that are all the same.
    """
    asked = exit_options(policy)
    traded = _tradeoff(what, tradeoff)
    require_length(length, FIRST)
    if limit < 2:
        raise UsageError(
            f"{limit} sequences leave none to judge by; give --limit 2, and better 200, or more", code="U625"
        )
    loaded = opened_base(source, **options)
    require_causal(loaded.model, "fit-exits")
    spec = loaded.opened.spec
    base, weights = plan_and_weights(Plan.identity(spec) if plan is None else plan, Plan.identity(spec), weights)
    if decides(base.steps()):
        raise UsageError(f"the plan {base} has gates or exits already; give the plan without them", code="U621")
    text = text_of(loaded, data, split=split, length=length, limit=limit, seed=seed)
    if what == "adainfer":
        if ungated(base) != Plan.identity(spec):
            raise UsageError(
                "the classifier of adainfer is fitted on the whole model; leave out --plan, or write the pruned model "
                "first",
                code="U621",
            )
        layers = sorted(set(exits_of(make_policy(asked.text, base, spec).plan).values()))
        return fit_adainfer(loaded.model, text, layers, batch=batch)
    return _lensed(loaded, spec, base, asked.text, text, weights, traded, batch, progress)


def _tradeoff(what: What, tradeoff: float | None) -> float | None:
    """The weight of leave-or-stay, None for what has none. Raises U699."""
    if what != "leave-or-stay" and tradeoff is not None:
        raise UsageError(
            f"--what {what} weighs nothing; leave out --tradeoff, or give --what leave-or-stay", code="U699"
        )
    if tradeoff is not None and not 0 <= tradeoff <= 1:
        raise UsageError(
            f"--tradeoff {tradeoff:g} is no weight of the agreement; give one from 0 to 1, as 0.5", code="U699"
        )
    return 0.5 if what == "leave-or-stay" and tradeoff is None else tradeoff


def _lensed(
    loaded: Loaded,
    spec: Spec,
    base: Plan,
    policy: str,
    text: Data,
    weights: Tensors,
    tradeoff: float | None,
    batch: int,
    progress: Progress | None,
) -> FittedExits:
    held = max(1, len(text) // 5)
    fitted, judged = text.only(range(len(text) - held)), text.only(range(len(text) - held, len(text)))
    plans = [make_policy(str(read(policy).having(head=head)), base, spec).plan for head in ("base", NAME)]
    tensors = dict(weights) | fit_lenses(loaded.model, plans[1], weights, fitted, batch=batch, progress=progress)
    fit = fit_probes if tradeoff is None else partial(fit_leave_or_stay, tradeoff=tradeoff)
    tensors |= fit(loaded.model, plans[1], tensors, fitted, batch=batch, progress=progress)
    own, through = (
        record_exits(loaded.model, one, judged, prompt=FIRST, weights=tensors, batch=batch, progress=progress)
        for one in plans
    )
    rows = tuple(_row(at, own, through) for at in range(len(own.layers)))
    return FittedExits(plans[1], tensors, rows, held, None if tradeoff is None else _decided(through, tradeoff))


def _decided(features: Features, tradeoff: float) -> dict[str, Any]:
    """What tokens cost that leave at the first exit which says so; see `FittedExits.decided`."""
    found = replay(features, "probe", [0.5] * len(features.layers))
    agreement = 1 - float(losses(features, parse_target("agreement=0.5"), found.left).mean())
    price = tradeoff * (1 - agreement) + (1 - tradeoff) * found.layers / features.depths[-1]
    return {"tradeoff": tradeoff, "agreement": agreement, "layers": found.layers, "cost": price}


def _row(at: int, own: Features, through: Features) -> dict[str, Any]:
    found: dict[str, Any] = {"layer": own.layers[at]}
    for name, features in (("own", own), ("lens", through)):
        found[f"agreement_{name}"] = 1 - float(sequence_means(features.wrong[at], features.counted).mean())
        found[f"rise_{name}"] = float(sequence_means(features.rise[at], features.counted).mean())
    right = ~through.wrong[at][through.counted]
    for name in ("probability", "probe"):
        found[f"ranked_{name}"] = _ranked(through.signals[name][at][through.counted], right)
    return found


def _ranked(signal: np.ndarray, right: np.ndarray) -> float | None:
    """How often a token that is right has a higher signal than one that is wrong; None without either."""
    count = int(right.sum())
    if not 0 < count < len(right):
        return None
    return float(mannwhitneyu(signal[right], signal[~right]).statistic / (count * (len(right) - count)))
