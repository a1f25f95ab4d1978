"""Loops: in training each sequence goes through repeated layers a number of times that is drawn."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import torch

from shoal.deciding.decisions import Decision
from shoal.deciding.forward import ForwardView
from shoal.deciding.gating import with_gates
from shoal.deciding.learning import sandwich
from shoal.deciding.policy import Grain, Policy
from shoal.deciding.policy_options import whole_numbers
from shoal.errors import UsageError
from shoal.examples import PolicyExamples, Refusal
from shoal.plan import Plan, Run, Spec
from shoal.plan.steps import runs

EXAMPLES = PolicyExamples(
    never=("loops",),
    plan="0,[1-2]x3,3",
    refused=(Refusal("a plan that repeats nothing", "loops", "U587", "second time"),),
)
AGAIN = "again"
"""What the gates of runs that come again begin with, in front of their number."""


def loops(plan: Plan, spec: Spec, *, menu: str = "") -> Policy:
    """In training run each sequence through the repeated layers as often as one entry of a `menu` says.

    The n-th run of a layer that the plan repeats counts to loop n. The first sequence of a micro-batch makes the most
    loops of the `menu` (1+2+4; default: each number up to the plan's), the second the fewest, each other one a number
    that is drawn. Where nothing is trained all loops run; a plan with fewer of them runs what has learned as well:
    0-9,[10-19]x2,20-29 for 0-9,[10-19]x4,20-29.

    Source: numbers of loops drawn in training: Geiping et al. 2025 (arXiv 2502.05171); a Universal Transformer of any
    number of steps: Dehghani et al. 2019 (arXiv 1807.03819).

    How we differ: uniform draws from a menu, where Geiping et al. draw from a log-normal Poisson mixture and let
    gradients through the last eight loops alone. Raises U587 for a plan that repeats nothing and for a menu that names
    no number of its loops.
    """
    times: Counter[tuple[int, str]] = Counter()

    def named(run: Run) -> str | None:
        times[run.layer, run.part] += 1
        number = times[run.layer, run.part]
        return None if number == 1 else f"{AGAIN}-{number}"

    placed = with_gates(plan, spec, plan.layers(), named, "project")
    most = max((_number(run) for run in runs(placed.steps())), default=1)
    if most == 1:
        raise UsageError(
            f"loops: {plan} runs no layer a second time; give a plan with a loop, as 0-9,[10-19]x2,20-29", code="U587"
        )
    return _Loops(placed, _menu(menu, most))


class _Loops(Policy):
    grain: ClassVar[Grain] = "row"
    only_training: ClassVar[bool] = True

    def __init__(self, plan: Plan, menu: tuple[int, ...]) -> None:
        super().__init__(plan)
        self.menu = menu

    def begin(self, forward: ForwardView) -> None:
        if forward.learning is not None and torch.is_grad_enabled():
            drawn = sandwich(forward.learning, len(self.menu), forward.rows)
            forward.notes["loops"] = torch.tensor([self.menu[entry] for entry in drawn])

    def should_run(self, run: Run, forward: ForwardView, hidden: torch.Tensor) -> Decision:
        loops = forward.notes.get("loops")
        if loops is None:
            return True
        open_for: torch.Tensor = loops.to(hidden.device) >= _number(run)
        return open_for[:, None].expand(-1, forward.tokens)


def _number(run: Run) -> int:
    """Which run of its layer it is, from 1."""
    gate = run.gate or ""
    return int(gate.removeprefix(f"{AGAIN}-")) if gate.startswith(f"{AGAIN}-") else 1


def _menu(text: str, most: int) -> tuple[int, ...]:
    """Numbers of loops in rising order. Raises U587."""
    found = whole_numbers(text) if text else tuple(range(1, most + 1))
    if found is None or not 1 <= found[0] <= found[-1] <= most:
        raise UsageError(
            f"loops: menu={text} names no numbers of loops of a plan that has {most}; write menu=1+{most}", code="U587"
        )
    return found
