"""When the steps of a plan run while the stock forward offers its layers one by one, and which slot each run has."""

from __future__ import annotations

from shoal.plan.steps import Step, runs, writes_kv


def schedule(steps: tuple[Step, ...], depth: int) -> tuple[list[list[tuple[int, Step]]], set[int]]:
    """For each layer the (position, step) pairs that run when it is offered, and the layers that run later.

    A step runs as soon as every layer that it needs has been offered.
    """
    due: list[list[tuple[int, Step]]] = [[] for _ in range(depth)]
    kept: set[int] = set()
    offered = 0
    for position, step in enumerate(steps):
        layers = [run.layer for run in runs((step,))]
        offered = max([offered, *layers])
        due[offered].append((position, step))
        kept |= {layer for layer in layers if layer < offered}
    return due, kept


def slots_of(steps: tuple[Step, ...]) -> dict[tuple[int, int], int]:
    """The cache slot of every run that stores KV, by (position of the step, branch)."""
    slots: dict[tuple[int, int], int] = {}
    for position, step in enumerate(steps):
        for branch, run in enumerate(runs((step,))):
            if writes_kv(run):
                slots[position, branch] = len(slots)
    return slots
