"""Some layers of the model, run in place of all of them over a KV cache of their own rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shoal.executing.bind import BoundPlan
from shoal.executing.recorder import Recorder, RunRecord
from shoal.models.opened import OpenedModel
from shoal.plan import Plan, Run


class LayerSubset(Recorder):
    """Steps of a draft, or what a draft left to run.

    `states`, [batch, tokens, hidden], enter the first step in place of what the stock forward begins with. `saved`
    grows by what comes out of layer `after`. Without steps nothing runs but norm and head, on `states`.
    """

    def __init__(self, opened: OpenedModel, steps: tuple[Run, ...], after: int | None = None) -> None:
        plan = Plan.identity(opened.spec)
        self.bound = BoundPlan(opened, plan.with_steps(steps) if steps else plan, {})
        self.executor = self.bound.executor()
        self.steps, self.after = steps, after
        self.rows = self.executor.rows if steps else ()
        """The base row behind each slot of the subset."""
        self.saved: list[torch.Tensor] = []
        self.states: torch.Tensor | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Until the end of the block the model's forwards run these layers."""
        begin = 0 if self.steps else self.executor.depth
        with self.bound.running(), self.executor.between(begin, self.states):
            if self.after is None:
                yield
            else:
                with self.executor.recording(self):
                    yield

    def ran(self, record: RunRecord) -> None:
        """Called by the executor for every run."""
        if record.run.layer == self.after:
            self.saved.append(record.output)

    def forget(self) -> None:
        """Drop all states."""
        self.saved, self.states = [], None
