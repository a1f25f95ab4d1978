"""What two plans of one base do differently, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import PlanError
from shoal.plan.notation import format_steps
from shoal.plan.steps import Exit, Map, Parallel, Plan, runs


@dataclass(frozen=True, slots=True)
class Change:
    """How one base layer runs in two plans, in depth notation; "-" where it does not run."""

    stack: str
    layer: int
    before: str
    after: str


def diff(before: Plan, after: Plan) -> list[Change]:
    """The layers that the two plans treat differently. Raises P101 when the plans are for different models.

    Order alone is one more change with layer -1, as no single layer owns it.
    """
    if before.base != after.base:
        raise PlanError(f"the plans are for different models: {before.base.family} and {after.base.family}", code="P101")
    changes: list[Change] = []
    for name, _ in before.stacks:
        uses, uses_after = _uses(before, name), _uses(after, name)
        for layer in range(before.depth(name)):
            old, new = uses.get(layer, "-"), uses_after.get(layer, "-")
            if old != new:
                changes.append(Change(name, layer, old, new))
        common = set(before.layers(name)) & set(after.layers(name))
        orders = [[i for i in plan.layers(name) if i in common] for plan in (before, after)]
        if orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]):
            changes.append(Change(name, -1, format_steps(before.steps(name)), format_steps(after.steps(name))))
    return changes


def _uses(plan: Plan, stack: str) -> dict[int, str]:
    """For each layer the notation of every step that it has a part in."""
    uses: dict[int, list[str]] = {}
    for step in plan.steps(stack):
        match step:
            case Map():
                layers = list(range(step.first, step.last + 1))
            case Parallel():
                layers = [run.layer for run in step.branches]
            case Exit():
                continue
            case _:
                layers = [run.layer for run in runs((step,))]
        for layer in dict.fromkeys(layers):
            uses.setdefault(layer, []).append(format_steps((step,)))
    return {layer: " + ".join(texts) for layer, texts in uses.items()}
