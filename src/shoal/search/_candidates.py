"""What searches share: the plans one removal away, how far to go, and judging them by any objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.errors import PlanError, ShoalError, UsageError, is_out_of_memory, out_of_memory
from shoal.plan import Plan, drop
from shoal.plan.price import removals
from shoal.plan.steps import PartName, runs
from shoal.scores import Budget, Legal, Objective, removable

Grain = Literal["layer", "attention", "mlp", "sublayers"]
"""What one removal takes away: a whole layer, the attention or the mlp of one, or whichever of these two."""

PARTS_OF: dict[str, tuple[PartName, ...]] = {
    "layer": ("layer",),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "sublayers": ("attention", "mlp"),
}


@dataclass(frozen=True, slots=True)
class Move:
    """One removal from a plan."""

    layer: int
    part: PartName
    plan: Plan
    """What is left."""
    stack: str | None = None
    """Named where the layers of several may go."""

    @property
    def note(self) -> str:
        where = "" if self.stack is None else f" of the {self.stack}"
        return f"{named(self.layer, self.part)}{where} removed"


def named(layer: int, part: PartName) -> str:
    """`layer 3`, `attention of layer 3`."""
    return f"layer {layer}" if part == "layer" else f"{part} of layer {layer}"


Stacks = str | Sequence[str] | None
"""One stack (None: the decoder, or the first), or several whose layers may go."""


def each_stack(stacks: Stacks) -> tuple[str | None, ...]:
    """The stacks one by one."""
    return (stacks,) if stacks is None or isinstance(stacks, str) else tuple(stacks)


def pieces(plan: Plan, grain: Grain, stack: str | None = None) -> list[tuple[int, PartName]]:
    """What could be removed from the plan, by layer. Raises U502 for a grain that does not exist."""
    if grain not in PARTS_OF:
        raise UsageError(f"there is no grain {grain!r}; use {', '.join(PARTS_OF)}", code="U502")
    there = sorted(set(plan.layers(stack)))
    running = {(run.layer, run.part) for run in runs(plan.steps(stack))}
    return [
        (layer, part)
        for layer in there
        for part in PARTS_OF[grain]
        if part == "layer" or {(layer, "layer"), (layer, part)} & running
    ]


def moves(plan: Plan, grain: Grain, legal: Legal, stacks: Stacks = None) -> list[Move]:
    """Every legal plan one removal away, by stack and layer."""
    found, several = [], len(each_stack(stacks)) > 1
    for stack in each_stack(stacks):
        for layer, part in pieces(plan, grain, stack):
            try:
                smaller = drop(plan, [layer], part=part, stack=stack)
            except PlanError:  # nothing would be left
                continue
            if legal(smaller):
                found.append(Move(layer, part, smaller, stack if several else None))
    return found


@dataclass(frozen=True, slots=True)
class Goal:
    """How far a search goes: a number of removals, or a budget."""

    start: Plan
    drop: int | None
    budget: Budget | None
    grain: Grain = "layer"
    stack: str | None = None

    def reached(self, plan: Plan, removed: int) -> bool:
        """Whether `plan`, `removed` removals away, is small enough."""
        return self.budget.met(plan) if self.budget is not None else removed >= (self.drop or 0)

    def removals(self) -> int:
        """How many removals it will take, for a budget by the price of the mean one."""
        if self.budget is None:
            return self.drop or 0
        there = pieces(self.start, self.grain, self.stack)
        mean = self.budget.mean_saving(self.start, self._without_each(there))
        return min(len(there), removals(self.budget.to_save(self.start), mean)) if mean > 0 else len(there)

    def _without_each(self, there: Sequence[tuple[int, PartName]]) -> Iterator[Plan]:
        for layer, part in there:
            try:
                yield drop(self.start, [layer], part=part, stack=self.stack)
            except PlanError:  # nothing would be left
                continue

    def missed(self, plan: Plan, removed: int, unjudged: int = 0) -> UsageError:
        """The error of a search that can remove nothing more from `plan`: nothing is legal, or of `unjudged` legal
        plans the objective gave none a value."""
        if unjudged and self.budget is not None:
            return no_value(unjudged)
        return unmet(self.budget, plan) if self.budget is not None else _few(removed, self.drop or 0, self.grain)


def goal(plan: Plan, drop: int | None, budget: Budget | None, grain: Grain = "layer", stack: str | None = None) -> Goal:
    """The goal of a search. Raises U540 unless exactly one of the two is given, U504 for a number that leaves nothing,
    U542 when there is nothing to choose from."""
    if (drop is None) == (budget is None):
        raise UsageError("a search needs either a number of removals or a budget; give one of them", code="U540")
    there = pieces(plan, grain, stack)
    if drop is not None and grain == "layer":
        removable(plan, drop, stack)
    if not there:
        raise UsageError(f"the plan {plan} has no {grain} left to remove; choose another grain", code="U542")
    if drop is not None and not 1 <= drop <= len(there):
        raise UsageError(f"cannot remove {drop} of {len(there)} parts; remove 1 or more and leave one", code="U504")
    return Goal(plan, drop, budget, grain, stack)


def goal_of_several(plan: Plan, drop: int, stacks: Sequence[str]) -> Goal:
    """The goal of removing `drop` layers of several stacks, each of which keeps one. Raises U504."""
    most = sum(len(pieces(plan, "layer", stack)) - 1 for stack in stacks)
    if not 1 <= drop <= most:
        raise UsageError(
            f"cannot remove {drop} layers of the stacks {', '.join(stacks)}, each of which keeps one; give 1 to {most}",
            code="U504",
        )
    return Goal(plan, drop, None)


def no_value(tried: int) -> UsageError:
    """The error U546 of a search whose objective knew no number."""
    return UsageError(
        f"the objective gave none of {tried} plans a value that is a number; mend it, or look at data and dtype",
        code="U546",
    )


def unmet(budget: Budget, plan: Plan) -> UsageError:
    """The error U543 of a budget below the cheapest plan that could be found."""
    least = budget.price_of(plan)
    return UsageError(
        f"a budget of {budget.unit}={budget.share:g} cannot be met: the cheapest plan found, {plan!s:.80}, costs "
        f"{least:.3f}; ask for {math.ceil(least * 1000) / 1000:.3f} or more",
        code="U543",
    )


def _few(possible: int, wanted: int, grain: Grain) -> UsageError:
    what = "layer" if grain == "layer" else "part"
    if possible:
        return UsageError(f"only {possible} {what}s may go, not {wanted}; ask for --drop {possible}", code="U504")
    return UsageError(
        f"no {what} may go: without any one of them the plan is not legal or could not be judged; "
        "allow plans that only run live, or name the layers",
        code="U504",
    )


def judge(
    objective: Objective,
    plans: Sequence[Plan],
    *,
    keep: int = 1,
    exhaustive: bool = False,
    report: Callable[[int], None] | None = None,
) -> list[float | None]:
    """The value of each plan; None for one that a racing objective dropped because `keep` others are better.

    An objective that can race (it has a method `race`) does, unless `exhaustive`. Raises U544 when the objective raises
    anything but an error of Shoal, U545 when it answers with something that is no number.
    """
    racing = getattr(objective, "race", None)
    if racing is not None and not exhaustive and len(plans) > keep:
        values: list[float | None] = racing(plans, keep=keep, report=report)
        return values
    values = []
    for number, plan in enumerate(plans):
        values.append(value_of(objective, plan))
        if report is not None:
            report(number + 1)
    return values


def value_of(objective: Objective, plan: Plan) -> float:
    """What the objective says of one plan; raises as `judge` does."""
    try:
        value = objective(plan)
    except ShoalError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(error) from error
        raise UsageError(
            f"the objective failed on the plan {plan!s:.80} ({type(error).__name__}: {error}); mend it and start "
            "again: what was evaluated before is in the journal, if there is one",
            code="U544",
        ) from error
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(
            f"the objective answered {value!r:.40} for the plan {plan!s:.80}; it must return a number", code="U545"
        ) from None


def best(values: Sequence[float | None]) -> int | None:
    """The place of the lowest value, the first of equals; None when none is a number."""
    numbers = [(value, place) for place, value in enumerate(values) if value is not None and not math.isnan(value)]
    return min(numbers)[1] if numbers else None
