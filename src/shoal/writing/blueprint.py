"""How a plan becomes a stock model: which base layer is in which place, and the config that says so."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from shoal.plan import Plan, Run

Tensors = dict[str, torch.Tensor]


class StackSlots(NamedTuple):
    """The slots of one stack: the base layer of each, and the parts that are zeroed or replaced."""

    slots: tuple[int, ...]
    """Base layer of each slot."""
    zeroed: tuple[tuple[int, str], ...] = ()
    """(slot, part) whose tensors are zeroed."""
    replaced: tuple[tuple[int, str], ...] = ()
    """(slot, id of the weights that it runs with)."""
    tied: tuple[tuple[int, int], ...] = ()
    """(slot, base layer whose matrices it runs with)."""


@dataclass(frozen=True)
class Blueprint:
    """How a plan becomes a stock model: known before a weight is read."""

    plan: Plan
    slots: tuple[int, ...]
    """Base layer of each slot, in the main stack: the decoder, or the first."""
    zeroed: tuple[tuple[int, str], ...]
    """(slot, part) whose tensors are zeroed so that it adds nothing."""
    config: PreTrainedConfig
    changed: dict[str, tuple[Any, Any]]
    replaced: tuple[tuple[int, str], ...] = ()
    """(slot, id of the weights that it runs with)."""
    weights: Tensors = field(default_factory=dict)
    """The tensors of these ids, ID.PARAMETER, in the dtype of the base's."""
    others: tuple[tuple[str, StackSlots], ...] = ()
    """(name, its slots, and what is zeroed, replaced and tied there) of every stack beside the main one."""
    tied: tuple[tuple[int, int], ...] = ()
    """(slot, base layer whose matrices it runs with)."""

    def of(self, stack: str) -> Blueprint:
        """The same with the slots of that stack as the main one's, and no other."""
        mine = StackSlots(self.slots, self.zeroed, self.replaced, self.tied)
        found = dict(self.others).get(stack, mine)
        return replace(self, **found._asdict(), others=())

    @property
    def whole(self) -> Plan:
        """The plan of what a stock checkpoint runs: whole layers, also where a part is zeroed."""
        plan = self.plan
        for name, _ in plan.stacks:
            plan = plan.with_steps(tuple(Run(layer) for layer in self.of(name).slots), name)
        return plan
