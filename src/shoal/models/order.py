"""Orders of layers that a family cannot run, because its loop carries more than the hidden state along."""

from __future__ import annotations

from itertools import pairwise

from shoal.errors import PlanError
from shoal.models.families import family_of
from shoal.models.stacks import Stack


def refuse_order(stack: Stack, layers: tuple[int, ...]) -> None:
    """Raise P126 when `layers`, base layers in the order of the plan, move or repeat one that the family cannot."""
    family = family_of(stack.config)
    moved = next((b for a, b in pairwise(layers) if b < a), None)
    again = next((i for n, i in enumerate(layers) if i in layers[:n]), None)
    for layer, what, why in ((moved, "runs after a later one", family.in_order), (again, "runs twice", family.once)):
        if layer is not None and why is not None:
            raise PlanError(
                f"layer {layer} {what}, but in {stack.config.model_type} {why}; keep each layer once and in order",
                code="P126",
            )
