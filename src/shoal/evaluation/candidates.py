"""One resident model under many plans: what each plan changes, paired with the dense model sequence by sequence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from shoal.data import Data
from shoal.errors import PlanError
from shoal.evaluation.resumable import Resumable, SharedStates
from shoal.evaluation.scoring import Progress, require_context, require_scored, windows
from shoal.executing.bind import BoundPlan, bind
from shoal.executing.inputs import forward_without_head, require_whole
from shoal.executing.weights import used_by
from shoal.models.evaluating import evaluating
from shoal.models.opened import open_model
from shoal.plan import Plan, check, drop, shapes_of
from shoal.plan.steps import PartName

Side = TypeVar("Side")
"""What one forward of one side leaves to compare: logits, states, losses."""


@dataclass(frozen=True)
class Candidates:
    """Plans in the order of the layers that they judge; None where there is none, with the reason among `refused`."""

    stack: str
    plans: tuple[Plan | None, ...]
    refused: tuple[str, ...]
    whole: Plan | None = None
    """What they are compared with; None: the whole model."""
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Tensors that plans name."""


def without_each(
    model: Any,
    what: str,
    *,
    part: PartName = "layer",
    stack: str | None = None,
    plan: Plan | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> Candidates:
    """For each layer the plan without it, or without its attention or mlp: of the whole model, or of what `plan` with
    its `weights` leaves of it. Raises U507 while a plan is running."""
    require_whole(model, what, stack)
    spec = open_model(model).spec
    whole, own = plan or Plan.identity(spec), dict(weights or {})
    there = set(whole.layers(stack))
    plans: list[Plan | None] = []
    refused: list[str] = []
    for layer in range(spec.stack(stack).depth):
        smaller = drop(whole, [layer], part=part, stack=stack) if len(there) > 1 and layer in there else None
        if smaller is None:
            problem: str | None = "it is the only one" if layer in there else "it does not run"
        else:
            shapes = shapes_of(used_by(smaller, own)) if own else None
            problem = next(iter(map(str, check(smaller, spec, shapes))), None)
        if problem is not None:
            refused.append(f"layer {layer} was not judged: {problem}")
        plans.append(None if problem is not None else smaller)
    return Candidates(spec.stack(stack).name, tuple(plans), tuple(refused), plan, own)


def compare_each(
    model: Any,
    data: Data,
    candidates: Candidates,
    forward: Callable[[torch.Tensor, torch.Tensor | None], Side],
    change: Callable[[Side, Side], Sequence[torch.Tensor]],
    *,
    what: str,
    batch: int = 1,
    progress: Progress | None = None,
) -> tuple[list[list[list[float]]], list[int], tuple[str, ...]]:
    """What every plan changes: ([plan][figure][sequence] sums over scored tokens, scored tokens, why not judged).

    `forward` runs one batch of (ids, mask); `change` takes the dense side and the plan's side to one or more figures,
    each [batch, length - 1], a number for each predicted token. Each batch is run dense and under every plan before the
    next, so that two sides are held at a time. A plan begins where it parts from the dense side, with the state that
    this left there (see `SharedStates`). A plan that the family cannot run (P126) is not judged.
    """
    require_context(model, data.ids.shape[1])
    plans, refused = list(candidates.plans), list(candidates.refused)
    bound: list[BoundPlan | None] = []
    for place, plan in enumerate(plans):
        try:
            own = None if plan is None else used_by(plan, candidates.weights)
            bound.append(None if plan is None else bind(model, plan, own))
        except PlanError as error:
            refused.append(f"layer {place} was not judged: {error}")
            bound.append(None)
    whole = bind(model, candidates.whole, candidates.weights)
    shared = SharedStates(whole, bound, Resumable(whole.opened, data.ids, partial(forward_without_head, whole.opened)))
    parts: list[list[torch.Tensor]] = [[] for _ in plans]
    counts: list[int] = []
    done, total = 0, len(data) * (1 + len(plans))

    def report(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total, what)

    for ids, mask, keep in windows(data, batch, None, what):
        with whole.running(), evaluating(model), shared.kept():
            dense = forward(ids, mask)
        counts += keep.sum(-1).tolist()
        report(len(ids))
        for place, one in enumerate(bound):
            if one is not None:
                # `evaluating` inside, so that modules which the plan puts in leave training mode too
                with one.running(), evaluating(model), shared.begun(place, one):
                    side = forward(ids, mask)
                figures = torch.stack([figure.cpu().double() for figure in change(dense, side)])
                parts[place].append(torch.where(keep, figures, 0.0).sum(-1))
            report(len(ids))
    shared.close()
    require_scored(sum(counts), data)
    number = next((len(own[0]) for own in parts if own), 1)
    nothing = [[math.nan] * len(data)] * number
    sums = [torch.cat(own, -1).tolist() if plan else nothing for plan, own in zip(bound, parts, strict=True)]
    return sums, counts, tuple(refused)
