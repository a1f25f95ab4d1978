"""Steps of one kind: who needs only these asks here, so that a new kind of step is answered for once and in one place,
which the type checker names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from shoal.plan.steps import Exit, Map, Parallel, Run, Step, runs


def run_of(step: Step) -> Run | None:
    """The step when it is a run of its own; None for any other kind, and so for a branch's group."""
    match step:
        case Run():
            return step
        case Map() | Parallel() | Exit():
            return None
        case _:
            assert_never(step)


def whole_run(step: Step | None) -> Run | None:
    """The step when it is the run of a whole layer with the layer's own tensors; None for anything else."""
    run = None if step is None else run_of(step)
    return run if run is not None and run.part == "layer" and run.own_tensors else None


def paired(steps: tuple[Step, ...]) -> Iterator[tuple[Run, Run | None]]:
    """Each run, that of an attention together with that of an mlp where this is the next step."""
    before: Run | None = None
    for step in steps:
        run = run_of(step)
        if before is not None and run is not None and (before.part, run.part) == ("attention", "mlp"):
            yield before, run
            before = None
            continue
        if before is not None:
            yield before, None
        before = run
        if run is None:
            yield from ((one, None) for one in runs((step,)))
    if before is not None:
        yield before, None


def maps(steps: tuple[Step, ...]) -> tuple[Map, ...]:
    """The fitted maps, in order."""
    found: list[Map] = []
    for step in steps:
        match step:
            case Map():
                found.append(step)
            case Run() | Parallel() | Exit():
                pass
            case _:
                assert_never(step)
    return tuple(found)


def groups(steps: tuple[Step, ...]) -> tuple[Parallel, ...]:
    """The parallel groups, in order."""
    found: list[Parallel] = []
    for step in steps:
        match step:
            case Parallel():
                found.append(step)
            case Run() | Map() | Exit():
                pass
            case _:
                assert_never(step)
    return tuple(found)


def exits(steps: tuple[Step, ...]) -> tuple[Exit, ...]:
    """The exits, in order."""
    found: list[Exit] = []
    for step in steps:
        match step:
            case Exit():
                found.append(step)
            case Run() | Map() | Parallel():
                pass
            case _:
                assert_never(step)
    return tuple(found)


def plain_layers(steps: tuple[Step, ...]) -> tuple[int, ...] | None:
    """The layers of steps that are whole layers of the base model and nothing else; None when one is something else."""
    layers = tuple(run.layer for run in map(run_of, steps) if run is not None)
    return layers if steps == tuple(map(Run, layers)) else None
