"""Orders of layers that a family cannot run, because its loop carries more than the hidden state along."""

from __future__ import annotations

from itertools import pairwise

from shoal.errors import PlanError
from shoal.models.families import family_of
from shoal.models.stacks import Stack


def refuse_order(stack: Stack, layers: tuple[int, ...]) -> None:
    """Raise P126 when `layers`, base layers in the order of the plan, move or repeat one that the family cannot, or
    begin with one that needs another before it."""
    family = family_of(stack.config)
    if family.takes_over is not None:
        field, entry = family.takes_over
        marks = getattr(stack.config, field, None)
        if isinstance(marks, list) and layers and marks[layers[0]] == entry:
            first = next((i for i, mark in enumerate(marks) if mark != entry), 0)
            raise PlanError(
                f"layer {layers[0]} runs first, but its {field} entry is {entry!r}: it takes over from the layer "
                f"before; begin the plan with another, such as {first}",
                code="P126",
            )
    moved = next((b for a, b in pairwise(layers) if b < a), None)
    again = next((i for n, i in enumerate(layers) if i in layers[:n]), None)
    for layer, what, why in ((moved, "runs after a later one", family.in_order), (again, "runs twice", family.once)):
        if layer is not None and why is not None:
            raise PlanError(
                f"layer {layer} {what}, but in {stack.config.model_type} {why}; keep each layer once and in order",
                code="P126",
            )
