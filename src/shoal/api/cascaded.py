"""cascade: cheap plans answer the items of a task that they are sure of, the rest goes to the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shoal.api.assess import Source, opened_base, planned, tokenizer_of
from shoal.api.task_scores import load_task_sets
from shoal.errors import UsageError
from shoal.evaluation.cascade import Cascaded, require_choices, run_cascade, stages_of
from shoal.evaluation.scoring import Progress
from shoal.evaluation.staged import NEVER, require_tradeoffs
from shoal.evaluation.tasks import Tasks
from shoal.executing.weights import Tensors, plan_and_weights
from shoal.models.kinds import require_answers
from shoal.plan import Given, Plan, cost, require, shapes_of
from shoal.record import plain

TRADEOFFS = (0.8, 0.9, 0.97)
"""Weights of wrong answers that are tried where none is given."""


@dataclass(frozen=True)
class CascadeTable:
    """One task: each plan alone, and what cascades of them make of the items that chose no threshold."""

    task: str
    plans: tuple[str, ...]
    """From the cheapest; the last one answers whatever is left."""
    costs: tuple[float, ...]
    """FLOPs of reading 512 tokens, as a share of the last plan's."""
    alone: tuple[dict[str, Any], ...]
    """accuracy, error, cost, seconds of each plan alone."""
    cascades: tuple[dict[str, Any], ...]
    """By trade-off: thresholds, accuracy, error, cost, seconds, and the share of the items that each plan answered."""
    chosen_on: int
    """Items that chose the thresholds; none of them is among the `items` of the figures."""
    items: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = plain(self.__dict__)
        return found


def cascade(
    source: Source,
    plans: Sequence[Given],
    tasks: Sequence[str | Path],
    *,
    plan: Given | None = None,
    weights: Tensors | None = None,
    tradeoffs: Sequence[float] = TRADEOFFS,
    task_items: int = 200,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> list[CascadeTable]:
    """For each task of choices: `plans`, cheap ones first, answer what they are sure of, and `plan` (default: the whole
    model) the rest. One half of the first `task_items` items, drawn with `seed`, chooses the thresholds for each weight
    w of `tradeoffs`, which make w (share of wrong answers) + (1 - w) cost small; the cascades are then run on the other
    half. `plans` and `plan` may be folders with weights of their own.

    Raises U700 for a weight outside of [0, 1], U701 without tasks or with too few items, U702 for items without
    choices, U703 for a plan that costs no less than the last one, and what plans and files raise.
    """
    require_tradeoffs(tradeoffs)
    if not tasks:
        raise UsageError("a cascade answers the items of a task; name a .jsonl file by --tasks", code="U701")
    asked = [require_choices(one) for one in load_task_sets(tasks, limit=task_items)]
    for one in asked:
        if len(one.items) < 4:
            raise UsageError(
                f"{one.name} has {len(one.items)} items, and half of them choose the thresholds; give 4 or more",
                code="U701",
            )
    loaded = opened_base(source, **options)
    require_answers(loaded.model, "a cascade")
    spec, tokenizer = loaded.opened.spec, tokenizer_of(loaded)
    identity = Plan.identity(spec)
    pairs = [plan_and_weights(one, identity) for one in plans]
    pairs.append(plan_and_weights(identity if plan is None else plan, identity, weights))
    shapes = [shapes_of(tensors) for _, tensors in pairs]
    legal = [require(own, spec, shape) for (own, _), shape in zip(pairs, shapes, strict=True)]
    flops = [cost(own, spec, weights=shape).prefill_flops for own, shape in zip(legal, shapes, strict=True)]
    costs = [one / flops[-1] for one in flops]
    for own, share in zip(legal[:-1], costs, strict=False):
        if share >= 1:
            raise UsageError(
                f"{own} costs {share:.2f} of what the last plan of the cascade costs; put cheaper plans in front of it",
                code="U703",
            )
    stages = [planned(loaded.model, own, tensors) for own, tensors in pairs]
    found = []
    for one in asked:
        choose, test = _halves(one, seed)
        recorded = [run_cascade([stage], tokenizer, choose, (), batch=batch, progress=progress) for stage in stages]
        best = stages_of([own.answers for own in recorded], choose, costs).best(tradeoffs)
        alone = [run_cascade([stage], tokenizer, test, (), batch=batch, progress=progress) for stage in stages]
        ran = [run_cascade(stages, tokenizer, test, own, batch=batch, progress=progress) for own in best]
        cascades = tuple(
            {"tradeoff": weight, "thresholds": [None if t == NEVER else t for t in own]}
            | _figures(run, test, costs)
            | {"answered": [float((run.stage == number).mean()) for number in range(len(stages))]}
            for weight, own, run in zip(tradeoffs, best, ran, strict=True)
        )
        rows = tuple(_figures(run, test, [share]) for run, share in zip(alone, costs, strict=True))
        names, counts = tuple(map(str, legal)), (len(choose.items), len(test.items))
        found.append(CascadeTable(one.name, names, tuple(costs), rows, cascades, *counts))
    return found


def _halves(tasks: Tasks, seed: int) -> tuple[Tasks, Tasks]:
    order = np.random.default_rng(seed).permutation(len(tasks.items)).tolist()
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    one, other = (replace(tasks, items=tuple(tasks.items[n] for n in sorted(half))) for half in (first, second))
    return one, other


def _figures(found: Cascaded, tasks: Tasks, costs: Sequence[float]) -> dict[str, Any]:
    count = len(tasks.items)
    right = 1 - found.answers.wrong(tasks).mean()
    read = sum(share * asked for share, asked in zip(costs, found.asked, strict=True)) / count
    error = (right * (1 - right) / (count - 1)) ** 0.5
    return {"accuracy": float(right), "error": float(error), "cost": float(read), "seconds": found.seconds}
