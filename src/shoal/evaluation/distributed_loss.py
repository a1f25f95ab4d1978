"""The cross-entropy of many plans, computed side by side in the processes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from shoal.data import Data
from shoal.evaluation.cluster import Machines, machines
from shoal.evaluation.cluster_resources import Cluster
from shoal.evaluation.layer_major_loss import LayerMajorLoss, Window
from shoal.evaluation.plan_loss import BatchLoss, PlanLoss
from shoal.models.load import Loaded
from shoal.plan import Plan
from shoal.plan.prefix import Prefix

CHUNKS = 4
"""Pieces of work for each process, where plans and not batches are handed out: suffixes differ in length."""

Row = tuple[int, Plan, Sequence[int] | None]
"""Number of the plan, the plan, the numbers of its batches; None for all of them at once, layer by layer."""


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
        self.facts = (data, own)

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
                jobs.append((process, (self.facts, mine, among)))
        return jobs

    def _by_plan(self, wanted: Mapping[Plan, Sequence[int]], among: Collection[Prefix] | None) -> list[tuple[Any, ...]]:
        rows = [(place, plan, list(own)) for place, (plan, own) in enumerate(wanted.items())]
        size = max(1, -(-len(rows) // (CHUNKS * self.pool.count)))
        return [(self.facts, rows[at : at + size], among) for at in range(0, len(rows), size)]


class DistributedLayers(LayerMajorLoss):
    """A `LayerMajorLoss` that hands each process of the pool a share of the plans: each reads every layer once for it.
    Only where layers lie in files is it asked."""

    def __init__(self, loss: DistributedLoss, *, memory: int | None = None) -> None:
        super().__init__(loss, memory=memory)
        self.facts, self.pool = loss.facts, loss.pool

    def __call__(
        self, plans: Sequence[Plan], windows: Sequence[Window], report: Callable[[int], None] | None = None
    ) -> list[float]:
        """The loss of each plan on all the data of the loss; `report` hears of the depth when all is done."""
        if windows is not self.loss.batches:  # the trial on a few tokens
            return super().__call__(plans, windows, report)
        size = -(-len(plans) // self.pool.count)
        rows = [(place, plan, None) for place, plan in enumerate(plans)]
        jobs = [(self.facts, rows[at : at + size], self.memory) for at in range(0, len(rows), size)]
        found = {place: value for answers in self.pool.anywhere(jobs) for place, value in answers}
        if report is not None:
            report(self.stack.depth)
        return [found[place] for place in range(len(plans))]


class LossWorker:
    """What works in each process: the losses of one model, on whatever data it is given."""

    def __init__(self, loaded: Loaded, _: Any = None) -> None:
        self.model = loaded.model
        self._losses: dict[str, PlanLoss] = {}

    def do(self, facts: tuple[Data, dict[str, Any]], rows: Sequence[Row], more: Any) -> Any:
        """The sums of these batches of these plans, where `more` are the prefixes worth keeping; of plans without
        batches (number, nats per token on all of them), where `more` is the memory for hidden states."""
        data, options = facts
        name = f"{data.info.sha256} {options}"
        if name not in self._losses:
            self._losses[name] = PlanLoss(self.model, data, **options)
        loss, plans = self._losses[name], [plan for _, plan, _ in rows]
        if all(numbers is None for _, _, numbers in rows):
            values = LayerMajorLoss(loss, memory=more)(plans, loss.batches)
            return [(place, value) for (place, _, _), value in zip(rows, values, strict=True)]
        places = {plan: place for place, plan, _ in rows}
        found = loss.computed({plan: numbers for _, plan, numbers in rows if numbers is not None}, more)
        return [(places[plan], number, part, seconds) for plan, number, part, seconds in found]


def loss_workers(loaded: Loaded, cluster: Cluster) -> AbstractContextManager[Machines | None]:
    """Processes of the cluster that hold the model for `DistributedLoss`; none without an address. Raises what
    `machines` does."""
    return machines(cluster, LossWorker, replace(loaded, tokenizer=None))
