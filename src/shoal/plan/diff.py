"""What two plans of one base do differently, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import PlanError
from shoal.plan.given import Given, given_plan, place_of
from shoal.plan.notation import format_steps
from shoal.plan.plan import Plan
from shoal.plan.steps import layers_of


@dataclass(frozen=True, slots=True)
class Change:
    """How one base layer runs in two plans, in depth notation; "-" where it does not run."""

    stack: str
    layer: int
    before: str
    after: str


def diff(before: Given, after: Given) -> list[Change]:
    """The layers that the two plans treat differently; empty only for equal plans. Raises P101 for plans of two models.

    Each is a Plan or the place of a plan.json; one of them may be depth notation, for the model of the other.
    What no single layer owns, the order and the exits, is one more change with layer -1 and both texts in full.
    """
    known = next((given for given in (before, after) if isinstance(given, Plan)), None)
    if known is None:
        known = next((given_plan(given, None) for given in (before, after) if place_of(given) is not None), None)
    before, after = given_plan(before, known), given_plan(after, known)
    if before.base != after.base:
        raise PlanError(
            f"the plans are for different models ({_model(before)} and {_model(after)}); compare plans of one model",
            code="P101",
        )
    changes: list[Change] = []
    for name, _ in before.stacks:
        uses, uses_after = _uses(before, name), _uses(after, name)
        found = [
            Change(name, layer, uses.get(layer, "-"), uses_after.get(layer, "-"))
            for layer in sorted(uses.keys() | uses_after.keys())
            if uses.get(layer) != uses_after.get(layer)
        ]
        owned = {change.layer for change in found}
        if _others(before, name, owned) != _others(after, name, owned):
            found.append(Change(name, -1, format_steps(before.steps(name)), format_steps(after.steps(name))))
        changes += found
    return changes


def _model(plan: Plan) -> str:
    return f"{plan.base.family}, {plan.base.fingerprint[:15]}"


def _uses(plan: Plan, stack: str) -> dict[int, str]:
    """For each layer the notation of every step that it has a part in."""
    uses: dict[int, list[str]] = {}
    for step in plan.steps(stack):
        for layer in dict.fromkeys(layers_of(step)):
            uses.setdefault(layer, []).append(format_steps((step,)))
    return {layer: " + ".join(texts) for layer, texts in uses.items()}


def _others(plan: Plan, stack: str, layers: set[int]) -> list[str]:
    """The steps, in order, that none of these layers has a part in."""
    return [format_steps((step,)) for step in plan.steps(stack) if layers.isdisjoint(layers_of(step))]
