"""A search that was cut off goes on where it was: every evaluated plan is one line in a file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from shoal.api.journal_file import journal_lines, open_journal, spent_of
from shoal.data import Data
from shoal.evaluation.cluster import Machines
from shoal.evaluation.layer_major_loss import LayerMajorLoss
from shoal.evaluation.plan_loss import Memo, PlanLoss
from shoal.evaluation.race import LEVEL, race
from shoal.evaluation.scoring import sequence_nll
from shoal.evaluation.spread_loss import SpreadLoss
from shoal.models.kinds import require_causal
from shoal.plan import Plan
from shoal.record import append_line
from shoal.scores import Objective


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
    memo: Memo | None = None,
    crew: Machines | None = None,
) -> Callable[[Data], Objective]:
    """Data -> objective: the cross-entropy of a plan on them, each plan evaluated once.

    With `path` the values are kept in a JSON-lines file (null for what is not finite), and the seconds they took, which
    `memo` counts as saved. Its first line names the data, the model's structure and the dense value, which is computed
    anew at every start, so that a journal of other weights is refused (D430). Plans share what they have in common
    (`PlanLoss`, where `memory`, `share` and `memo` are explained), and the objective can race many plans, in an order
    of the batches drawn with `seed`. `crew`: processes that share the work.
    """
    memo = Memo() if memo is None else memo
    if path is not None:
        memo.saved += spent_of(journal_lines(path))

    def on(data: Data) -> Objective:
        require_causal(model, "a search by cross-entropy")
        known, lost, spent = _opened(path, identity, data.info.sha256, lambda: mean_nll(model, data, batch=batch))
        asked: dict[str, Any] = {"batch": batch, "memory": memory, "share": share, "memo": memo}
        loss = PlanLoss(model, data, **asked) if crew is None else SpreadLoss(model, data, crew, **asked)
        return Journaled(loss, memo, path, known, lost, seed, memory=memory, spent=spent)

    return on


def kept(function: Objective, name: str, identity: Plan, *, path: Path | None, memo: Memo | None = None) -> Objective:
    """A method's own objective, each plan evaluated once: values go into the journal as those of `journaled` do, under
    the objective's `name`, which tells what it is computed on, and into `memo` for searches that follow."""
    memo = Memo() if memo is None else memo
    known, _, spent = _opened(path, identity, name, lambda: function(identity))

    def value(plan: Plan) -> float:
        nonlocal spent
        key = str(plan)
        if key not in known:
            if (name, key) in memo.values:
                known[key], seconds = memo.values[name, key]
                memo.saved += seconds
            else:
                begun = perf_counter()
                known[key] = function(plan)
                seconds = perf_counter() - begun
                memo.values[name, key] = known[key], seconds
            spent += seconds
            if path is not None:
                append_line(path, {"plan": key, "nll": known[key], "spent": round(spent, 3)})
        return known[key]

    return value


def _opened(
    path: Path | None, identity: Plan, data: str, dense: Callable[[], float]
) -> tuple[dict[str, float], dict[str, set[str]], float]:
    return ({}, {}, 0.0) if path is None else open_journal(path, identity.base.fingerprint, data, dense)


class Journaled:
    """An objective that remembers: whole values by plan, and which plans were dropped in which race."""

    def __init__(
        self,
        loss: PlanLoss,
        memo: Memo,
        path: Path | None,
        known: dict[str, float],
        lost: dict[str, set[str]],
        seed: int = 0,
        *,
        memory: int | None = None,
        spent: float = 0.0,
    ) -> None:
        self.loss, self.memo, self.path, self.known, self.lost, self.seed = loss, memo, path, known, lost, seed
        self.by_layer = LayerMajorLoss(loss, memory=memory)
        self._spent, self._since = spent, 0.0

    def __call__(self, plan: Plan) -> float:
        """Nats per token on all the data."""
        key = str(plan)
        if key not in self.known:
            with self._clocked():
                self._learn(key, self.loss(plan))
        return self.known[key]

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
        lost = self.lost.setdefault(name, set())
        open_ = [plan for plan, key in zip(plans, keys, strict=True) if key not in self.known and key not in lost]
        decided = len(plans) - len(open_)

        def dropped(plan: Plan, seen: int) -> None:
            lost.add(str(plan))
            if self.path is not None:
                append_line(self.path, {"lost": str(plan), "race": name, "batches": seen, "spent": self.spent})

        with self._clocked():
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
                    self._learn(str(plan), value)
        return [None if key in lost else self.known[key] for key in keys]

    def _layer_by_layer(
        self, plans: Sequence[Plan], keys: Sequence[str], report: Callable[[int], None] | None
    ) -> list[float | None]:
        new = {key: plan for key, plan in zip(keys, plans, strict=True) if key not in self.known}
        done, depth = len(plans) - len(new), self.by_layer.stack.depth
        told = None if report is None else lambda layers: report(done + len(new) * layers // depth)
        with self._clocked():
            losses = self.by_layer(list(new.values()), self.loss.batches, told) if new else []
            for key, value in zip(new, losses, strict=True):
                self._learn(key, value)
        return [self.known[key] for key in keys]

    @property
    def spent(self) -> float:
        """Seconds that evaluating took so far, those of earlier runs and of the other searches it learnt from too."""
        now = perf_counter() + self.memo.saved - self._since if self._since else 0.0
        return round(self._spent + now, 3)

    @contextmanager
    def _clocked(self) -> Iterator[None]:
        self._since = perf_counter() + self.memo.saved
        try:
            yield
        finally:
            self._spent, self._since = self.spent, 0.0

    def _learn(self, key: str, value: float) -> None:
        self.known[key] = value
        if self.path is not None:
            append_line(self.path, {"plan": key, "nll": value, "spent": self.spent})
