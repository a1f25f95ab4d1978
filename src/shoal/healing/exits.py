"""Which exits a term reads in a step, and how much each counts."""

from __future__ import annotations

from typing import Literal

import torch

from shoal.errors import UsageError
from shoal.healing.seen import Seen
from shoal.plan import Run
from shoal.plan.select import exits

Weights = Literal["layerskip", "aligned", "uniform"]


def depths_of(seen: Seen) -> list[int]:
    """The base layers of the plan in the order of its steps, each that ends a layer once."""
    steps = seen.plan.steps(seen.stack)
    there = [step.layer for step in steps if isinstance(step, Run) and step.part != "attention"]
    return list(dict.fromkeys(there))


def weights_of(count: int, by: Weights, scale: float) -> list[float]:
    """How much each of `count` exits counts, the last being the end of the model; not yet divided by their sum.

    layerskip: e(l) = `scale` l (l + 1) / 2 for l below L - 1, and L - 1 + `scale` (L - 1)(L - 2) / 2 for the last (l
    from 0); aligned: 2 l / (L (L + 1)), l from 1; uniform: 1.
    """
    if by == "uniform":
        return [1.0] * count
    if by == "aligned":
        return [2 * layer / (count * (count + 1)) for layer in range(1, count + 1)]
    early = [scale * layer * (layer + 1) / 2 for layer in range(count - 1)]
    return [*early, count - 1 + scale * (count - 1) * (count - 2) / 2]


def open_exits(count: int, which: str, step: int, progress: float, what: str) -> list[bool]:
    """Which of `count` exits count in a step. all; rotate:R: those l with l = step modulo R; gradual: from the last one
    down, one more for each 1 / (2 L) of the stage. Where no gradient is wanted all count. Raises U502."""
    word, _, number = which.partition(":")
    rotates = word == "rotate" and number.isdecimal() and int(number) > 0
    if which not in ("all", "gradual") and not rotates:
        raise UsageError(f"{what}: which={which} is not one of all, rotate:8, gradual; write which=all", code="U502")
    if which == "all" or not torch.is_grad_enabled():
        return [True] * count
    if rotates:
        turn = int(number)
        found = [layer % turn == step % turn for layer in range(count)]
        return found if any(found) else [True] * count
    return [layer >= count - 1 - int(progress * 2 * count) for layer in range(count)]


def heads_of_exits(seen: Seen) -> dict[int, str]:
    """By base layer the head of the plan's exit behind it, where that is one of its own."""
    found, last = dict[int, str](), -1
    for step in seen.plan.steps(seen.stack):
        if isinstance(step, Run):
            last = step.layer
        elif step in exits((step,)):
            found[last] = step.head
    return found
