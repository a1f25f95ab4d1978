"""Which exits a term reads in a step, and how much each counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch

from shoal.errors import UsageError
from shoal.healing.seen import Seen
from shoal.plan import Exit, Plan, Run
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


Place = tuple[torch.Tensor, str]
"""States of the student, as `Seen.over_logits` reads them, and the head that reads them."""


def places_of(seen: Seen, at: str, what: str) -> list[Callable[[], Place]]:
    """What is read at each exit in front of the end, in the order of the plan. exits: at the plan's own, by their own
    heads or lenses; every:N: behind each N-th layer of the base, by norm and head of the model. Raises U502."""
    word, _, number = at.partition(":")
    if word == "every" and number.isdecimal() and int(number):
        layers = [layer for layer in depths_of(seen)[:-1] if (layer + 1) % int(number) == 0]
        return [partial(_behind, seen, layer) for layer in layers]
    if at != "exits":
        raise UsageError(f"{what}: at={at} is not one of exits, every:4; write {what}:at=every:4", code="U502")
    return [partial(_at, seen, step) for step in require_exits(seen.plan, seen.stack, what)]


def require_exits(plan: Plan, stack: str, what: str) -> list[Exit]:
    """The exits at which tokens may leave: all but the head of a plan's own at its end. Raises U502 for none."""
    found = [step for step in exits(plan.steps(stack)) if step.gate is not None]
    if not found:
        raise no_exit(what)
    return found


def check_of_exits(what: str, at: str) -> Callable[..., None]:
    """The CHECK_PLAN of a term that reads exits `at` where nothing else is said: it raises U502 for a plan without the
    exits that are to be read, before anything is loaded."""

    def check(plan: Plan, stack: str, *, at: str = at, **_: Any) -> None:
        if at == "exits":
            require_exits(plan, stack, what)

    return check


def no_exit(what: str) -> UsageError:
    """U502: a term that has nothing to read."""
    return UsageError(
        f"{what} finds no exit; give a plan that has some (shoal fit-exits), or {what}:at=every:4", code="U502"
    )


def _behind(seen: Seen, layer: int) -> Place:
    return seen.student.behind[layer], "base"


def _at(seen: Seen, step: Exit) -> Place:
    return seen.sides[0].at_exit(seen.student, step), step.head
