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

from shoal.data import Data
from shoal.errors import DataError
from shoal.evaluation.cluster import Machines
from shoal.evaluation.layer_major_loss import LayerMajorLoss
from shoal.evaluation.plan_loss import Memo, PlanLoss
from shoal.evaluation.race import LEVEL, race
from shoal.evaluation.scoring import sequence_nll
from shoal.evaluation.spread_loss import SpreadLoss
from shoal.models.kinds import require_causal
from shoal.plan import Plan
from shoal.record import append_line, read_objects
from shoal.scores import Objective

FORMAT = "shoal-journal/1"


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
        memo.saved += _spent(_lines(path))

    def on(data: Data) -> Objective:
        require_causal(model, "a search by cross-entropy")
        known, lost, spent = _open(path, model, identity, data, batch) if path is not None else ({}, {}, 0.0)
        asked: dict[str, Any] = {"batch": batch, "memory": memory, "share": share, "memo": memo}
        loss = PlanLoss(model, data, **asked) if crew is None else SpreadLoss(model, data, crew, **asked)
        return Journaled(loss, memo, path, known, lost, seed, memory=memory, spent=spent)

    return on


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


def _open(
    path: Path, model: Any, identity: Plan, data: Data, batch: int
) -> tuple[dict[str, float], dict[str, set[str]], float]:
    """The values in the journal, what lost in which race, the seconds it took; a new journal gets its first line."""
    lines = _lines(path)
    facts = {"journal": FORMAT, "base": identity.base.fingerprint, "data": data.info.sha256}
    head = lines[0] if lines else {}
    if lines and head.get("journal") != FORMAT:
        raise DataError(f"{path} is not a journal of Shoal; name another file", code="D430")
    dense = mean_nll(model, data, batch=batch)
    if not lines:
        append_line(path, {**facts, "dense": dense})
        return {}, {}, 0.0
    before = _number(head.get("dense"))
    if any(head.get(name) != value for name, value in facts.items()) or not math.isclose(before, dense, rel_tol=1e-4):
        raise DataError(f"the journal {path} belongs to another model or other data; name another file", code="D430")
    entries = lines[1:]
    lost: dict[str, set[str]] = {}
    for entry in entries:
        if {"lost", "race"} <= entry.keys():
            lost.setdefault(str(entry["race"]), set()).add(str(entry["lost"]))
    known = {str(entry["plan"]): _number(entry["nll"]) for entry in entries if {"plan", "nll"} <= entry.keys()}
    return known, lost, _spent(entries)


def _spent(lines: Sequence[dict[str, Any]]) -> float:
    return max((float(line["spent"]) for line in lines if isinstance(line.get("spent"), int | float)), default=0.0)


def _lines(path: Path) -> list[dict[str, Any]]:
    """What the lines of a journal hold; none if there is no file yet. Raises D430 for what cannot be read."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return read_objects(path)
    except OSError as error:
        raise DataError(f"cannot keep a journal at {path} ({error.strerror}); name another file", code="D430") from None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
