"""Formats that say what is left out: every layer at most once, in order, whole or without its attention or mlp."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from shoal.exchange._format import refuse_unless_said
from shoal.plan import Plan, Run, Step
from shoal.plan.steps import runs


@dataclass(frozen=True)
class Drops:
    """0-based base layers whose attention, or mlp, does not run; a layer in both does not run at all."""

    attention: frozenset[int]
    mlp: frozenset[int]


def apply_drops(identity: Plan, drops: Drops) -> Plan:
    """The whole model without these parts. Raises P104 when no layer is left."""
    return identity.with_steps(_steps(identity.depth(), drops.attention, drops.mlp))


def drops_of(plan: Plan, *, name: str, whole: bool = False) -> Drops:
    """What the plan leaves out. Raises N104 when it does more than that; `whole`: when it splits a layer."""
    running = list(runs(plan.steps()))
    layers = frozenset(range(plan.depth()))
    attention = layers - {run.layer for run in running if whole or run.part != "mlp"}
    mlp = layers - {run.layer for run in running if whole or run.part != "attention"}
    can = "which layers are removed" if whole else "which layers, attentions and mlps are removed"
    refuse_unless_said(plan, _steps(plan.depth(), attention, mlp), name=name, can=f"only {can}")
    return Drops(attention, mlp)


def _steps(depth: int, attention: AbstractSet[int], mlp: AbstractSet[int]) -> tuple[Step, ...]:
    steps: list[Step] = []
    for layer in range(depth):
        if layer not in attention and layer not in mlp:
            steps.append(Run(layer))
        elif layer not in attention:
            steps.append(Run(layer, "attention"))
        elif layer not in mlp:
            steps.append(Run(layer, "mlp"))
    return tuple(steps)
