"""What people type in a policy's options: lists of layers, and shares."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.errors import UsageError
from shoal.plan import Plan
from shoal.plan.notation import parse_steps
from shoal.plan.select import plain_layers


def layer_list(text: str) -> tuple[int, ...]:
    """Read 3-5,7 as (3, 4, 5, 7). Raises N001 for what is no notation, U584 for more than whole layers, once each."""
    layers = plain_layers(parse_steps(text))
    if layers is None or len(set(layers)) != len(layers):
        raise UsageError(f"{text!r:.60} is no list of layers; write whole layers, as in 3-5,7", code="U584")
    return layers


def whole_numbers(text: str) -> tuple[int, ...] | None:
    """Read 4+1+2 as (1, 2, 4); None for anything else than whole numbers joined by +."""
    pieces = text.split("+")
    # "²" is a digit, and no whole number
    return tuple(sorted({int(piece) for piece in pieces})) if all(piece.isdecimal() for piece in pieces) else None


def exit_layers(plan: Plan, *, layers: str = "", first: int | None = None, every: int = 1) -> tuple[int, ...]:
    """Behind which layers of `plan` a pass may end: `layers`, or every `every`-th one from `first` on (default: the
    middle of the plan), never the last. Raises U584 when there is none."""
    there = plan.layers()[:-1]
    if layers:
        return layer_list(layers)
    start = there[len(there) // 2] if first is None and there else first
    found = [layer for layer in there if start is not None and layer >= start]
    if every < 1 or not found:
        raise UsageError(
            f"first={first} and every={every} leave no place for an exit before the last of the layers {plan}; choose "
            "an earlier layer",
            code="U584",
        )
    return tuple(found[::every])


def share(name: str, value: float) -> float:
    """`value` when it lies in [0, 1]. Raises U586."""
    if not 0 <= value <= 1:
        raise UsageError(f"{name}={value:g} is no share; give a number from 0 to 1", code="U586")
    return value


def kept_layers(plan: Plan, text: str) -> tuple[int, ...]:
    """The layers in `text`, all of `plan` when it is empty. Raises U584 for one that the plan does not run."""
    listed = layer_list(text) if text else plan.layers()
    if missing := sorted(set(listed) - set(plan.layers())):
        raise UsageError(
            f"layer {missing[0]} in {text!r:.60} is none of the layers of the plan, {plan}; name its layers",
            code="U584",
        )
    return listed


def spread(depth: int, number: int) -> list[int]:
    """`number` of `depth` places, as even as can be, the first and the last among them when there are two."""
    return sorted({round(place * (depth - 1) / (number - 1)) for place in range(number)}) if number > 1 else [0]


def hierarchy(layers: Sequence[int]) -> list[int]:
    """The inner ones of `layers` in the order in which hierarchical skipping leaves them out: every second one, then
    every second of those that are left, and so on. The first and the last are never among them."""
    order: list[int] = []
    left = list(layers[1:-1])
    while left:
        order += left[::2]
        left = left[1::2]
    return order
