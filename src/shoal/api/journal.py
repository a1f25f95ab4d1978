"""A search that was cut off goes on where it was: every evaluated plan is one line in a file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from shoal.api.journal_file import DroppedPlan, open_journal, spent_in
from shoal.data import Data
from shoal.evaluation.cluster import Machines
from shoal.evaluation.distributed_loss import DistributedLayers, DistributedLoss
from shoal.evaluation.layer_major_loss import LayerMajorLoss
from shoal.evaluation.plan_loss import PlanLoss
from shoal.evaluation.race import LEVEL, race
from shoal.evaluation.scoring import sequence_nll
from shoal.ledger import Key, Ledger
from shoal.models.kinds import require_causal
from shoal.plan import Plan
from shoal.scores import Objective

Heard = Callable[[Key, float], None]
"""Told what a ledger is given: a plan's text or a `DroppedPlan`, and the value."""


def mean_nll(model: Any, data: Data, *, batch: int = 1) -> float:
    """Cross-entropy in nats per token of the model as it runs now."""
    scored = sequence_nll(model, data, batch=batch)
    return math.fsum(total for total, _ in scored) / sum(count for _, count in scored)


def journaled(
    model: Any,
    identity: Plan,
    *,
    path: Path | None = None,
    batch: int = 1,
    memory: int | None = None,
    share: bool = True,
    seed: int = 0,
    memo: Ledger[Any] | None = None,
    pool: Machines | None = None,
    heard: Heard | None = None,
) -> Callable[[Data], Objective]:
    """Data -> objective: the cross-entropy of a plan on them, each plan evaluated once.

    With `path` the values are kept in a JSON-lines file (null for what is not finite), and the seconds they took, which
    `memo` counts as saved. Its first line names the data, the model's structure and the dense value, which is computed
    anew at every start, so that a journal of other weights is refused (D430). Plans share what they have in common
    (`PlanLoss`, where `memory`, `share` and `memo` are explained), and the objective can race many plans, in an order
    of the batches drawn with `seed`. `pool`: processes that share the work. `heard`: told of
    each plan that is evaluated, and its value.
    """
    memo = Ledger[Any]() if memo is None else memo
    if path is not None:
        memo.saved += spent_in(path)

    def on(data: Data) -> Objective:
        require_causal(model, "a search by cross-entropy")
        dense = partial(mean_nll, model, data, batch=batch)
        ledger = open_journal(path, identity.base.fingerprint, data.info.sha256, dense, data.info.describe())
        ledger.heard = heard
        asked: dict[str, Any] = {"batch": batch, "memory": memory, "share": share, "memo": memo}
        loss = PlanLoss(model, data, **asked) if pool is None else DistributedLoss(model, data, pool, **asked)
        return Journaled(loss, ledger, memo, seed, memory=memory)

    return on


def kept(
    function: Objective,
    name: str,
    identity: Plan,
    *,
    path: Path | None,
    memo: Ledger[Any] | None = None,
    heard: Heard | None = None,
) -> Objective:
    """A method's own objective, each plan evaluated once: values go into the journal as those of `journaled` do, under
    the objective's `name`, which tells what it is computed on, and into `memo` for searches that follow."""
    memo = Ledger[Any]() if memo is None else memo
    ledger = open_journal(path, identity.base.fingerprint, name, partial(function, identity))
    ledger.heard = heard

    def value(plan: Plan) -> float:
        key = str(plan)
        if key not in ledger:
            found = memo.once((name, key), partial(function, plan))
            ledger.add(key, found, memo.seconds((name, key)))
        return ledger[key]

    return value


class Journaled:
    """An objective that remembers: whole values by plan, and which plans were dropped in which race."""

    def __init__(
        self,
        loss: PlanLoss,
        ledger: Ledger[float],
        memo: Ledger[Any],
        seed: int = 0,
        *,
        memory: int | None = None,
    ) -> None:
        self.loss, self.ledger, self.memo, self.seed = loss, ledger, memo, seed
        self.by_layer = (
            DistributedLayers(loss, memory=memory)
            if isinstance(loss, DistributedLoss)
            else LayerMajorLoss(loss, memory=memory)
        )

    @property
    def known(self) -> Mapping[str, float]:
        """The values of the plans that were evaluated on all the data."""
        return {key: value for key, value in self.ledger.items() if isinstance(key, str)}

    def __call__(self, plan: Plan) -> float:
        """Nats per token on all the data."""
        key = str(plan)
        if key not in self.ledger:
            with self._working():
                self.ledger.add(key, self.loss(plan))
        return self.ledger[key]

    def race(
        self, plans: Sequence[Plan], *, keep: int = 1, report: Callable[[int], None] | None = None
    ) -> list[float | None]:
        """The value of each plan, None for one that `keep` others beat (see `shoal.evaluation.race`).

        Of a model whose layers lie in files all are evaluated, layer by layer (`LayerMajorLoss`), and none is dropped.
        What was dropped has no value in the journal: it is noted as lost in this very race, the same plans with the
        same settings, and is not run again when the race is.
        """
        keys = [str(plan) for plan in plans]
        if self.by_layer.takes(plans):
            return self._layer_by_layer(plans, keys, report)
        facts = [sorted(keys), keep, LEVEL, self.seed, len(self.loss.batches)]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        known = self.ledger
        open_ = [
            plan
            for plan, key in zip(plans, keys, strict=True)
            if key not in known and DroppedPlan(name, key) not in known
        ]
        decided = len(plans) - len(open_)

        def dropped(plan: Plan, seen: int) -> None:
            known.add(DroppedPlan(name, str(plan)), seen)

        with self._working():
            values = race(
                self.loss,
                open_,
                keep=keep,
                seed=self.seed,
                report=None if report is None else lambda done: report(decided + done),
                dropped=dropped,
            )
            for plan, value in zip(open_, values, strict=True):
                if value is not None:
                    known.add(str(plan), value)
        return [None if DroppedPlan(name, key) in known else known[key] for key in keys]

    def _layer_by_layer(
        self, plans: Sequence[Plan], keys: Sequence[str], report: Callable[[int], None] | None
    ) -> list[float | None]:
        new = {key: plan for key, plan in zip(keys, plans, strict=True) if key not in self.ledger}
        done, depth = len(plans) - len(new), self.by_layer.stack.depth
        report_layers = None if report is None else lambda layers: report(done + len(new) * layers // depth)
        with self._working():
            losses = self.by_layer(list(new.values()), self.loss.batches, report_layers) if new else []
            for key, value in zip(new, losses, strict=True):
                self.ledger.add(key, value)
        return [self.ledger[key] for key in keys]

    @property
    def spent(self) -> float:
        """Seconds that evaluating took so far, those of earlier runs and of the other searches it learnt from too."""
        return round(self.ledger.spent, 3)

    @contextmanager
    def _working(self) -> Iterator[None]:
        with self.ledger.working(lambda: perf_counter() + self.memo.saved):
            yield
