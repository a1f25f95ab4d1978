"""A sampling run under a schedule: branches are computed, or answer what they answered in the last full step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.reuse.branches import Call, around_forwards, copied, modules_of, shapes_given
from shoal.reuse.schedule import ReuseSchedule


@dataclass
class ReuseTrace:
    """What has happened in a block so far."""

    steps: int = 0
    """Calls of the model."""
    computed: Counter[str] = field(default_factory=Counter)
    """How often each branch was computed."""
    reused: Counter[str] = field(default_factory=Counter)


@contextmanager
def reusing(model: nn.Module, schedule: ReuseSchedule) -> Iterator[ReuseTrace]:
    """Until the end of the block the model's calls are the steps of one sampling run, under `schedule`.

    A full step computes every branch b_i and keeps what it made, y_i. Another step computes those whose beta is above
    the threshold; the others are not called, and y_i is their answer. One call of the model is one step, so guidance
    goes through it as one batch; each sampling run is a block of its own. The model's own forward runs, its parameters
    are not touched, and afterwards it has the attributes that it had.

    Raises U707 where the model lacks a branch of the schedule, U708 for more calls than the schedule has steps, U709
    where a branch is called twice in a step, not in every step, with other shapes, or makes no tensor.

    Source: Ma et al. 2024 (Learning-to-Cache, arXiv 2406.01733; as in its released code for DiT).

    How we differ: branches are any modules; in the released code a computed branch of a cache step replaces what was
    kept, which is the same where full and cache steps alternate.
    """
    run = SteppedRun(schedule)
    with run.around(model):
        yield run.trace


class SteppedRun:
    """Counts the steps of one sampling run, and keeps what full steps made."""

    def __init__(self, schedule: ReuseSchedule) -> None:
        self.schedule, self.trace = schedule, ReuseTrace()
        self.kept: dict[str, tuple[list[tuple[int, ...]], Any]] = {}
        """By branch the shapes that it was given in the last full step, and what it made of them."""
        self._called: set[str] = set()
        self._inside = False

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Meanwhile calls of the model are steps of this run."""
        names = self.schedule.branches
        named = enumerate(zip(names, modules_of(model, names), strict=True))
        branches = [(module, partial(self._branch, at, name)) for at, (name, module) in named]
        with around_forwards([(model, self._step), *branches]):
            yield

    def _step(self, forward: Callable[[], Any], _: Call) -> Any:
        trace, schedule = self.trace, self.schedule
        if trace.steps == schedule.steps:
            raise UsageError(
                f"the model is called a {trace.steps + 1}th time, and the schedule has {schedule.steps} steps; begin a "
                "new block for each sampling run, or fit a schedule with as many steps as the sampler has",
                code="U708",
            )
        trace.steps += 1
        self._called.clear()
        if schedule.is_full(trace.steps - 1):
            self.kept.clear()
        self._inside = True
        try:
            return forward()
        finally:
            self._inside = False

    def _branch(self, at: int, name: str, forward: Callable[[], Any], call: Call) -> Any:
        if not self._inside:  # somebody calls a layer alone
            return forward()
        if name in self._called:
            raise _refusal(name, "is called twice in a step", "name the modules inside it")
        self._called.add(name)
        step = self.trace.steps - 1
        if self.schedule.is_full(step):
            self.trace.computed[name] += 1
            out = forward()
            first_tensor(name, out)
            self.kept[name] = shapes_given(call), copied(out)
            return out
        return self.answer(step, at, name, forward, call)

    def answer(self, step: int, at: int, name: str, forward: Callable[[], Any], call: Call) -> Any:
        """What a branch hands on in a step that is not full."""
        if self.schedule.computes(step, at):
            self.trace.computed[name] += 1
            return forward()
        kept = self.last_made(name, call)
        self.trace.reused[name] += 1
        return copied(kept)

    def last_made(self, name: str, call: Call) -> Any:
        """What a branch made in the last full step."""
        shapes, made = self.kept.get(name, (None, None))
        if shapes is None:
            raise _refusal(name, "was not called in the last full step", "leave it out")
        if shapes != shapes_given(call):
            raise _refusal(name, f"was given {shapes} and is now given {shapes_given(call)}", "keep the shapes")
        return made


def first_tensor(name: str, out: Any) -> torch.Tensor:
    """The tensor that a branch made; of a tuple the first. Raises U709 for anything else."""
    first = out[0] if isinstance(out, tuple) and out else out
    if not isinstance(first, torch.Tensor):
        raise _refusal(name, f"makes a {type(out).__name__}", "name a module that makes a tensor")
    return first


def _refusal(name: str, why: str, remedy: str) -> UsageError:
    return UsageError(f"the branch {name} cannot be reused: it {why}; {remedy}", code="U709")
