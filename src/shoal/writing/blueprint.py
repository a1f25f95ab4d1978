"""How a plan becomes a stock model: which base layer is in which place, and the config that says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from shoal.plan import KV, Plan, Run, format_steps
from shoal.plan.sources import StackLayer
from shoal.plan.steps import PartName
from shoal.writing.shared_kv import Readers

Tensors = dict[str, torch.Tensor]


AND = "|"
"""Between the ids of a run that has shared tensors and its own."""


class Origin(NamedTuple):
    """Where the tensors of a slot, or some of them, come from."""

    slot: int
    layer: int
    """Base layer."""
    weights: str | None
    """The id of the tensors that stand in the place of the layer's."""
    tie: int | StackLayer | None
    """Base layer, of this stack or of another, whose matrices do."""
    mlp_names: tuple[str, ...]
    """How the names of the tensors begin that come with the mlp, where that is of another run."""
    with_mlp: bool
    """Whether it is those that come from here; otherwise all others."""
    lacks: tuple[str, ...] = ()
    """How the names of the layer's tensors begin that the slot does not have."""

    def holds(self, name: str) -> bool:
        """Whether the slot's tensor `name` is that of the layer here."""
        return name.startswith(self.mlp_names) is self.with_mlp and not name.startswith(self.lacks)


class MlpHalf(NamedTuple):
    """The mlp in a slot where it is of another run than the attention."""

    layer: int
    """Base layer."""
    names: tuple[str, ...]
    """How the names of the tensors begin that come with it."""
    weights: str | None = None
    tie: int | StackLayer | None = None


class StackSlots(NamedTuple):
    """The slots of one stack: the base layer of each, and the parts that are zeroed or replaced."""

    slots: tuple[int, ...]
    """Base layer of each slot, of its attention where the mlp is another's."""
    zeroed: tuple[tuple[int, str], ...] = ()
    """(slot, part) whose tensors are zeroed."""
    replaced: tuple[tuple[int, str], ...] = ()
    """(slot, ids of the weights that it runs with, `AND` between them)."""
    tied: tuple[tuple[int, int | StackLayer], ...] = ()
    """(slot, base layer whose matrices it runs with)."""
    mlps: tuple[tuple[int, MlpHalf], ...] = ()
    """(slot, its mlp) where that is of another run; what is replaced and tied there says nothing of it."""
    readers: Readers = ()
    """The slots that read the KV of another, as the family's own class does."""
    lacks: tuple[tuple[int, tuple[str, ...]], ...] = ()
    """(slot, how the names begin of what its base layer has and it has not, as it reads the KV of another)."""


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
    """(slot, ids of the weights that it runs with, `AND` between them)."""
    weights: Tensors = field(default_factory=dict)
    """The tensors of these ids, ID.PARAMETER, in the dtype of the base's."""
    others: tuple[tuple[str, StackSlots], ...] = ()
    """(name, its slots, and what is zeroed, replaced and tied there) of every stack beside the main one."""
    tied: tuple[tuple[int, int | StackLayer], ...] = ()
    """(slot, base layer whose matrices it runs with)."""
    mlps: tuple[tuple[int, MlpHalf], ...] = ()
    """(slot, its mlp) where that is of another run."""
    readers: Readers = ()
    """The slots that read the KV of another, as the family's own class does."""
    lacks: tuple[tuple[int, tuple[str, ...]], ...] = ()
    """(slot, how the names begin of what its base layer has and it has not, as it reads the KV of another)."""
    fewer: int = 0
    """Elements of the tensors that slots lack."""

    def origins(self) -> Iterator[Origin]:
        """Slot by slot whose tensors it has."""
        ids, ties, mlps, lacks = dict(self.replaced), dict(self.tied), dict(self.mlps), dict(self.lacks)
        for slot, layer in enumerate(self.slots):
            mlp = mlps.get(slot)
            names = () if mlp is None else mlp.names
            yield Origin(slot, layer, ids.get(slot), ties.get(slot), names, with_mlp=False, lacks=lacks.get(slot, ()))
            if mlp is not None:
                yield Origin(slot, mlp.layer, mlp.weights, mlp.tie, names, with_mlp=True)

    def of(self, stack: str) -> Blueprint:
        """The same with the slots of that stack as the main one's, and no other."""
        mine = StackSlots(*(getattr(self, name) for name in StackSlots._fields))
        found = dict(self.others).get(stack, mine)
        return replace(self, **found._asdict(), others=())

    @property
    def halves(self) -> tuple[str, ...]:
        """The halves that are slots of their own, as depth notation: the other part of each is zeroed."""
        own = [self.of(name) for name, _ in self.plan.stacks]
        other: dict[str, PartName] = {"attention": "mlp", "mlp": "attention"}
        return tuple(format_steps((Run(one.slots[slot], other[part]),)) for one in own for slot, part in one.zeroed)

    @property
    def whole(self) -> Plan:
        """The plan of what a stock checkpoint runs: whole layers, also where a part is zeroed."""
        plan = self.plan
        for name, _ in plan.stacks:
            own = self.of(name)
            reads = dict(own.readers)
            whole = (Run(layer, kv=KV(reads.get(slot))) for slot, layer in enumerate(own.slots))
            plan = plan.with_steps(tuple(whole), name)
        return plan
