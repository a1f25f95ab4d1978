"""What a plan may cost, and how many layers that means for methods that count layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from shoal.errors import UsageError
from shoal.evaluation.scoring import Progress
from shoal.evaluation.time_model import Phase, TimeModel, fitted_time_model, measured_share
from shoal.plan import Plan, Spec, shapes_of
from shoal.plan import drop as drop_layers
from shoal.plan.price import FIGURES, CountedPrice, removals
from shoal.scores import Budget, Unit

COUNTED = FIGURES
"""The units that are counted; the others are measured."""


def parse_budget(text: str) -> tuple[Unit, float]:
    """Unit and share of a text such as params=0.8. Raises U523."""
    name, _, value = text.partition("=")
    units: dict[str, Unit] = {unit: unit for unit in get_args(Unit)}
    try:
        share = float(value)
    except ValueError:
        share = math.nan
    if name.strip() not in units or not 0 < share < 1:
        raise UsageError(
            f"{text!r:.60} is no budget; write UNIT=SHARE with a share between 0 and 1 and one of the units "
            f"{', '.join(units)}, such as params=0.8",
            code="U523",
        )
    return units[name.strip()], share


def counted_budget(unit: Unit, share: float, spec: Spec, *, weights: Mapping[str, Any] | None = None) -> Budget:
    """A budget in a unit that `cost` counts.

    `weights`: tensors, or their shapes, that plans may name, as those of fitted maps that a search chooses from; a map
    of which nothing is known counts as a full one. Raises U523 when the model has none of the unit (a KV cache, say),
    U560 for a unit that is measured.
    """
    if unit not in COUNTED:
        raise UsageError(
            f"a budget in {unit} is measured on the loaded model, which is not loaded here; use one of "
            f"{', '.join(COUNTED)}, or leave out --dry-run",
            code="U560",
        )
    price = CountedPrice(unit, spec, shapes_of(weights or {}))
    if not price.dense:
        raise UsageError(f"{spec.family} has no {unit} to save; choose another unit", code="U523")
    return Budget(unit, share, price)


def measured_budget(
    unit: Unit, share: float, model: Any, *, prompt: int = 512, seed: int = 0, progress: Progress | None = None
) -> Budget:
    """A budget in milliseconds of prefill or decode, as a share of dense; its price is a `TimeModel`, measured now.

    Raises U561 when nothing of the model can be left out, and what `speed` raises.
    """
    phase: Phase = "prefill" if unit == "prefill" else "decode"
    return Budget(unit, share, fitted_time_model(model, phase, prompt=prompt, seed=seed, progress=progress))


def priced(
    budget: Budget,
    plan: Plan,
    model: Any,
    *,
    weights: Mapping[str, Any] | None = None,
    prompt: int = 512,
    seed: int = 0,
    timed: bool = True,
) -> dict[str, Any]:
    """What `plan` with its `weights` costs, as a share of dense: for a measured unit the prediction, its error, and, if
    `timed`, the time itself."""
    facts: dict[str, Any] = {"unit": budget.unit, "asked": budget.share, "price": budget.price_of(plan, weights)}
    if isinstance(budget.price, TimeModel):
        times = budget.price
        facts |= {"error": times.error, "dense_ms": times.dense_ms, "timed": dict(times.timed)}
        if timed:
            work: dict[str, Any] = {"prompt": prompt, "new": 16, "pairs": 3, "seed": seed}
            facts["measured"] = measured_share(model, plan, times.phase, weights=weights, **work)
    return facts


def layers_for(budget: Budget, plan: Plan, stack: str | None = None) -> int:
    """How many layers of mean price must go to meet the budget. Raises U523 with the nearest share that can be met."""
    layers = sorted(set(plan.layers(stack)))
    whole, smaller = budget.price_of(plan), (drop_layers(plan, [i], stack=stack) for i in layers if len(layers) > 1)
    mean = budget.mean_saving(plan, smaller)
    needed = removals(budget.to_save(plan), mean) if mean > 0 else len(layers)
    if needed >= len(layers):
        least = whole - mean * (len(layers) - 1)
        raise UsageError(
            f"a budget of {budget.unit}={budget.share:g} cannot be met by removing layers: one layer alone costs "
            f"{least:.3f}; ask for {math.ceil(least * 1000) / 1000:.3f} or more",
            code="U523",
        )
    return max(1, needed)


def amount_of(
    spec: Spec, stack: str | None, drop: int | None, keep: float | None, budget: str | Budget | None
) -> tuple[int, Budget | None]:
    """The number of layers to remove, and the budget that it comes from. Raises U521, U522, U523 or U560."""
    if budget is None:
        return layers_to_drop(spec, stack, drop, keep), None
    if drop is not None or keep is not None:
        raise UsageError("give a budget or a number of layers, not both", code="U521")
    most = budget if isinstance(budget, Budget) else counted_budget(*parse_budget(budget), spec)
    return layers_for(most, Plan.identity(spec), stack), most


def refuse_amount(method: str, *amounts: object) -> None:
    """Raise U665 when an amount is given to a method that removes nothing."""
    if any(one is not None for one in amounts):
        raise UsageError(
            f"{method} makes the model deeper and removes nothing; leave --drop, --keep and --budget out (its options "
            "say how far it goes: shoal ls methods)",
            code="U665",
        )


def layers_to_drop(spec: Spec, stack: str | None, drop: int | None, keep: float | None) -> int:
    """The number of layers to remove. Raises U522 when it is not given once, or leaves none, or takes none."""
    depth = spec.stack(stack).depth
    if (drop is None) == (keep is None):
        raise UsageError("say how much to remove: --drop LAYERS, --keep SHARE or --budget UNIT=SHARE", code="U522")
    if keep is not None and not 0 < keep < 1:
        raise UsageError(f"--keep {keep} is not a share between 0 and 1", code="U522")
    count = drop if drop is not None else depth - max(1, round(depth * (keep or 0)))
    if not 1 <= count < depth:
        raise UsageError(f"cannot remove {count} of {depth} layers; give 1 to {depth - 1}", code="U522")
    return count
