"""The cross-entropy of many plans on a model whose layers lie in files: each is read once for all plans and batches.

What plans have in common runs once, and no plan is dropped on the way: reading is what takes time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from shoal.evaluation.plan_loss import BatchLoss, PlanLoss, mean_of, part_of
from shoal.evaluation.scoring import batch_tokens
from shoal.executing.bind import bind
from shoal.models.evaluating import evaluating
from shoal.models.opened import open_model
from shoal.models.streamed import is_streamed
from shoal.plan import Plan, Run
from shoal.plan.capabilities import is_right
from shoal.plan.steps import runs
from shoal.recording.layer_major import LayerMajor, Path

Window = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]
"""Ids, mask and the tokens that are scored, as `shoal.evaluation.scoring.windows` cuts them."""
At = Callable[[int, int], AbstractContextManager[object]]
"""From the number of a plan and that of a batch to where a forward of the batch ends as under that plan."""
TRIAL_TOKENS = 8
"""Tokens on which it is tried whether the way layer by layer gives what the stock forward gives."""


class LayerMajorLoss:
    """Plans -> nats per token, equal bit for bit to the running plan on the same batches, where `takes` says so."""

    def __init__(self, loss: PlanLoss, *, memory: int | None = None) -> None:
        """`memory`: bytes of hidden states held, None for a quarter of what is free."""
        self.loss, self.model, self.memory, self.stack = loss, loss.model, memory, open_model(loss.model).stack()
        self._same: bool | None = None

    def takes(self, plans: Sequence[Plan]) -> bool:
        """Whether layers are read from files and every plan runs layers or parts of them in order, in a model where
        nothing but the hidden state travels. That is tried once, on a few tokens: forwards that begin in the middle
        and at the last layer, and the first and the last plan side by side."""
        paths = [path_of(plan, self.stack.depth) for plan in plans]
        if not plans or None in paths or not is_streamed(self.stack):
            return False
        if self._same is None:
            cuts = {self.stack.depth // 2, self.stack.depth - 1} - {0}
            self._same = all(map(self.loss.resumable, cuts)) and self._tried([plans[0], plans[-1]])
        return self._same

    def __call__(
        self, plans: Sequence[Plan], windows: Sequence[Window], report: Callable[[int], None] | None = None
    ) -> list[float]:
        """The loss of each plan on all batches; `report` is called with the number of layers that were read."""
        with self.at_their_ends(plans, [(ids, mask) for ids, mask, _ in windows], report) as at:
            return [
                mean_of([self._end(at(place, number), window) for number, window in enumerate(windows)])
                for place in range(len(plans))
            ]

    @contextmanager
    def at_their_ends(
        self,
        plans: Sequence[Plan],
        batches: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        report: Callable[[int], None] | None = None,
    ) -> Iterator[At]:
        """Run `batches` through all plans, each layer read once. Meanwhile `at(p, n)` is a context in which a forward
        of batch n gives the logits that it gives under plan p, and reads no layer."""
        paths = [path for path in (path_of(plan, self.stack.depth) for plan in plans) if path is not None]
        ends = [tuple(step for at in path for step in at) for path in paths]
        with evaluating(self.model):
            layer_major = LayerMajor(self.model, self.stack, batches, memory=self.memory)
            try:
                layer_major.run_paths(paths, report=report)
                with bind(self.model).running() as bound:
                    executor = bound.executor(self.stack.name)
                    yield lambda place, number: executor.between(executor.depth, layer_major.state(ends[place], number))
            finally:
                layer_major.close()

    def _end(self, at: AbstractContextManager[object], window: Window) -> BatchLoss:
        ids, mask, keep = window
        with at:
            return part_of(batch_tokens(self.model, ids, mask, keep), keep)

    def _tried(self, plans: Sequence[Plan]) -> bool:
        ids = self.loss.data.ids[:1, :TRIAL_TOKENS]
        window = (ids, torch.ones_like(ids), torch.ones(1, ids.shape[1] - 1, dtype=torch.bool))
        wanted = []
        for plan in plans:
            with evaluating(self.model), bind(self.model, plan).running():
                wanted.append(mean_of([part_of(batch_tokens(self.model, *window), window[2])]))
        try:
            return self(plans, [window]) == wanted
        except (RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError):
            return False  # a layer asks for what one before it would have left


def path_of(plan: Plan, depth: int) -> Path | None:
    """For each layer the steps of the plan that run there; None for a plan with anything but layers and parts of
    layers, each at its place."""
    if len(plan.stacks) > 1:
        return None
    if not is_right(plan.steps(), "streamed"):
        return None
    at: list[list[Run]] = [[] for _ in range(depth)]
    for run in runs(plan.steps()):
        at[run.layer].append(run)
    return tuple(map(tuple, at))
