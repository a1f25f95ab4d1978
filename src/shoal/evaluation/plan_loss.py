"""The cross-entropy of many plans on the same data: what plans have in common is computed once."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch

from shoal.data import Data
from shoal.evaluation.resumable import Entering, Resumable
from shoal.evaluation.scoring import (
    batch_tokens,
    logits_of,
    require_context,
    require_scored,
    windows,
)
from shoal.executing.bind import BoundPlan, bind
from shoal.ledger import Ledger
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.models.opened import open_model
from shoal.plan import Plan
from shoal.plan.prefix import Prefix, prefixes, shared
from shoal.recording.state_store import StateStore

BLOCK = 8
"""Neighbouring tokens whose losses count as one sample of a race."""


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """What one plan scored on one batch, in nats."""

    sums: tuple[float, ...]
    """By sequence."""
    counts: tuple[int, ...]
    blocks: tuple[float, ...]
    """The sums of `BLOCK` neighbouring tokens each, sequence after sequence; those without a scored token left out."""
    sizes: tuple[int, ...]
    """Scored tokens in each block."""


class PlanLoss:
    """Plan -> cross-entropy on `data`, equal bit for bit to `sequence_nll` of the running plan on the same batches.

    The hidden state at which plans part is kept (see `StateStore`), so that a plan whose first layers another plan ran
    already computes only what follows. A model in which something besides the hidden state travels from layer to layer
    is found by trying (a few tokens, every cut, before it is used) and runs in full. `share=False` runs all in full.
    `memo`: what other searches on this very model have found: by the data's hash with the batch size, the plan and the
    number of the batch a `BatchLoss` (by the name of any other objective and the plan its value, see
    `shoal.api.journal`). Raises `UsageError` U510 for windows longer than the context, `DataError` D420 if no token is
    scored.
    """

    def __init__(
        self,
        model: Any,
        data: Data,
        *,
        batch: int = 1,
        share: bool = True,
        memory: int | None = None,
        disk: int | None = None,
        memo: Ledger[Any] | None = None,
    ) -> None:
        require_context(model, data.ids.shape[1])
        self.opened, self.model, self.data = open_model(model), model, data
        self.batches = tuple(windows(data, batch, None, ""))
        require_scored(sum(int(keep.sum()) for _, _, keep in self.batches), data)
        self.layers_run = 0
        """Layers that were run so far, over all batches; what sharing saved shows here."""
        self.states = StateStore(device_of(model), memory=memory, disk=disk)
        self._memo = Ledger[Any]() if memo is None else memo
        self._name = f"{data.info.sha256} {batch}"
        self._share = share and len(self.opened.stacks) == 1
        self.resumable = Resumable(self.opened, data.ids, partial(logits_of, model))
        self._prefixes: dict[Plan, dict[int, Prefix]] = {}

    def __call__(self, plan: Plan) -> float:
        """Nats per token over all the data."""
        return mean_of(self.parts([plan], range(len(self.batches)))[0])

    def parts(
        self, plans: Sequence[Plan], numbers: Iterable[int], *, among: Collection[Prefix] | None = None
    ) -> list[list[BatchLoss]]:
        """The sums of these batches, by their number, for each plan. `among`: the only prefixes whose states are worth
        keeping."""
        wanted, known, missing = list(numbers), self._memo, dict[Plan, list[int]]()
        for plan in plans:
            keys = {number: (self._name, str(plan), number) for number in wanted}
            known.reuse(key for key in keys.values() if key in known)
            missing[plan] = [number for number, key in keys.items() if key not in known]
        todo = {plan: own for plan, own in missing.items() if own}
        for plan, number, part, seconds in self.computed(todo, among) if todo else ():
            known.add((self._name, str(plan), number), part, seconds)
        return [[known[self._name, str(plan), number] for number in wanted] for plan in plans]

    def computed(
        self, wanted: Mapping[Plan, Sequence[int]], among: Collection[Prefix] | None
    ) -> Iterator[tuple[Plan, int, BatchLoss, float]]:
        """Plan, number, sums and seconds of these batches of these plans, whether they are known or not."""
        for plan, numbers in wanted.items():
            starts = {number: self._start(plan, number) for number in numbers}
            bound = bind(self.opened, plan)
            with evaluating(self.model), bound.running():
                for number in numbers:
                    begun = perf_counter()
                    part = self._part(bound, plan, number, starts[number], among)
                    yield plan, number, part, perf_counter() - begun

    def forks(self, plans: Collection[Plan]) -> set[Prefix]:
        """What `parts` may be told to keep when all of `plans` are going to be evaluated."""
        return shared(plans) if self._share else set()

    def close(self) -> None:
        """Forget the hidden states."""
        self.states.close()

    def _of(self, plan: Plan) -> dict[int, Prefix]:
        if plan not in self._prefixes:
            if len(self._prefixes) > 4096:
                self._prefixes.clear()
            self._prefixes[plan] = prefixes(plan)
        return self._prefixes[plan]

    def _start(self, plan: Plan, number: int) -> int:
        """The last cut for which there is a state of this batch, 0 if there is none."""
        if not self._share:
            return 0
        known = (cut for cut, prefix in self._of(plan).items() if (number, prefix) in self.states)
        return next((cut for cut in sorted(known, reverse=True) if self.resumable(cut)), 0)

    def _part(self, bound: BoundPlan, plan: Plan, number: int, cut: int, among: Collection[Prefix] | None) -> BatchLoss:
        ids, mask, keep = self.batches[number]
        own = self._of(plan) if self._share else {}
        state = self.states.get((number, own[cut])) if cut else None

        def enters(index: int, hidden: Any) -> None:
            self.layers_run += 1
            prefix = own.get(index)
            if prefix is not None and (among is None or prefix in among) and isinstance(hidden, torch.Tensor):
                self.states.put((number, prefix), hidden)

        executor = bound.executor()
        with executor.between(cut if state is not None else 0, state), executor.recording(Entering(enters)):
            return part_of(batch_tokens(self.model, ids, mask, keep), keep)


def mean_of(parts: Iterable[BatchLoss]) -> float:
    """Nats per token of all parts together."""
    parts = list(parts)
    return math.fsum(total for part in parts for total in part.sums) / sum(n for part in parts for n in part.counts)


def part_of(nll: torch.Tensor, keep: torch.Tensor) -> BatchLoss:
    """What the losses of one batch, float64 [batch, length - 1], add up to; `keep` says which tokens are scored."""
    short = -nll.shape[1] % BLOCK
    blocks = torch.nn.functional.pad(nll, (0, short)).reshape(-1, BLOCK).sum(-1)
    sizes = torch.nn.functional.pad(keep, (0, short)).reshape(-1, BLOCK).sum(-1)
    scored = sizes > 0
    return BatchLoss(
        tuple(nll.sum(-1).tolist()),
        tuple(keep.sum(-1).tolist()),
        tuple(blocks[scored].tolist()),
        tuple(sizes[scored].tolist()),
    )
