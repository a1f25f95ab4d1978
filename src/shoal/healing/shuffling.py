"""Layers that run in another order in each step of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shoal.deciding.policy_options import layer_list
from shoal.errors import UsageError
from shoal.executing.bind import BoundPlan, require_legal
from shoal.healing.shown import Side
from shoal.plan import Plan
from shoal.plan.select import run_of

ALL = "all"


class Shuffling:
    """Puts the runs of some layers into an order that is drawn; all permutations are as likely."""

    def __init__(self, side: Side, layers: str) -> None:
        """`layers`: all, or a list of those of the plan. Raises U717 where they are not, U584 for what is no list."""
        self.side = side
        steps = side.bound.plan.steps(side.stack.name)
        wanted = None if layers == ALL else set(layer_list(layers))
        found = {at: run.layer for at, step in enumerate(steps) if (run := run_of(step)) is not None}
        if missing := sorted((wanted or set()) - set(found.values())):
            raise UsageError(
                f"shuffle={layers}: the plan {side.bound.plan} has no step that runs layer {missing[0]}; name layers "
                "of the plan",
                code="U717",
            )
        self.places = [at for at, layer in found.items() if wanted is None or layer in wanted]
        """Of the steps that change places."""

    def order(self, seed: int) -> list[int]:
        """Which of the runs stands at each place."""
        drawn: list[int] = torch.randperm(len(self.places), generator=torch.Generator().manual_seed(seed)).tolist()
        return drawn

    def plan(self, seed: int) -> Plan:
        """The plan in the order of this seed."""
        plan, name = self.side.bound.plan, self.side.stack.name
        steps = list(plan.steps(name))
        moved = [steps[at] for at in self.places]
        for at, number in zip(self.places, self.order(seed), strict=True):
            steps[at] = moved[number]
        return plan.with_steps(tuple(steps), name)

    @contextmanager
    def drawn(self, seed: int) -> Iterator[None]:
        """Inside, the side runs in the order of this seed. Raises P1xx for an order that the model cannot run."""
        before = self.side.bound
        plan = require_legal(before.opened, self.plan(seed), before.tensors)
        self.side.bound = BoundPlan(before.opened, plan, before.tensors)
        try:
            yield
        finally:
            self.side.bound = before
