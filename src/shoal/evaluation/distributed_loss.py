"""The cross-entropy of many plans, computed side by side in the processes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from shoal.data import Data
from shoal.errors import UsageError
from shoal.evaluation.cluster import Machines, machines
from shoal.evaluation.plan_loss import BatchLoss, PlanLoss
from shoal.models.placed import is_placed
from shoal.plan import Plan
from shoal.plan.prefix import Prefix

CHUNKS = 4
"""Pieces of work for each process, where plans and not batches are handed out: suffixes differ in length."""

Results = list[tuple[int, int, BatchLoss, float]]
"""Number of the plan, number of the batch, sums, seconds."""


class DistributedLoss(PlanLoss):
    """A `PlanLoss` whose batches run in the processes of `pool`: the same values to the last bit where these compute as
    this one does (as many threads, the same processor).

    Each process takes its own batches where there are enough of them, so that the hidden states it keeps are those it
    will need, and plans that lie side by side otherwise.
    """

    def __init__(self, model: Any, data: Data, pool: Machines, **options: Any) -> None:
        super().__init__(model, data, **options)
        self.pool = pool
        own = {name: value for name, value in options.items() if name != "memo"}
        self._facts = (data, own)

    def computed(
        self, wanted: Mapping[Plan, Sequence[int]], among: Collection[Prefix] | None
    ) -> Iterator[tuple[Plan, int, BatchLoss, float]]:
        plans = list(wanted)
        answers = (
            self.pool.at(self._by_batch(wanted, among))
            if len({number for own in wanted.values() for number in own}) >= self.pool.count
            else self.pool.anywhere(self._by_plan(wanted, among))
        )
        for found in answers:
            for place, number, part, seconds in found:
                yield plans[place], number, part, seconds

    def _by_batch(
        self, wanted: Mapping[Plan, Sequence[int]], among: Collection[Prefix] | None
    ) -> list[tuple[int, tuple[Any, ...]]]:
        jobs = []
        for process in range(self.pool.count):
            mine = [
                (place, plan, [number for number in own if number % self.pool.count == process])
                for place, (plan, own) in enumerate(wanted.items())
            ]
            if mine := [one for one in mine if one[2]]:
                jobs.append((process, (self._facts, mine, among)))
        return jobs

    def _by_plan(self, wanted: Mapping[Plan, Sequence[int]], among: Collection[Prefix] | None) -> list[tuple[Any, ...]]:
        rows = [(place, plan, list(own)) for place, (plan, own) in enumerate(wanted.items())]
        size = max(1, -(-len(rows) // (CHUNKS * self.pool.count)))
        return [(self._facts, rows[at : at + size], among) for at in range(0, len(rows), size)]


class LossWorker:
    """What works in each process: the losses of one model, on whatever data it is given."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._losses: dict[str, PlanLoss] = {}

    def do(
        self,
        facts: tuple[Data, dict[str, Any]],
        rows: Sequence[tuple[int, Plan, list[int]]],
        among: Collection[Prefix] | None,
    ) -> Results:
        """The sums of these batches of these plans."""
        data, options = facts
        name = f"{data.info.sha256} {options}"
        if name not in self._losses:
            self._losses[name] = PlanLoss(self.model, data, **options)
        places = {plan: place for place, plan, _ in rows}
        found = self._losses[name].computed({plan: numbers for _, plan, numbers in rows}, among)
        return [(places[plan], number, part, seconds) for plan, number, part, seconds in found]


def loss_workers(model: Any, address: str | None, count: int) -> AbstractContextManager[Machines | None]:
    """`count` processes at `address` that hold the model for `DistributedLoss`; none without an address.

    Raises U571 as `machines` does, U572 for a model whose layers are read from files as they are needed, or that a
    device map spreads.
    """
    refuse_spread(address, model)
    return machines(address, count, LossWorker, model)


def refuse_spread(address: str | None, model: Any) -> None:
    """Raise U572 for a model that is not whole in memory, where processes at `address` would each hold it."""
    if address is not None and is_placed(model):
        raise UsageError(
            "--ray keeps the whole model in the memory of each process, and --stream or --device-map keeps a part "
            "of it elsewhere; leave one of them out",
            code="U572",
        )
