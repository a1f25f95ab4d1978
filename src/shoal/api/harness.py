"""One model, one protocol: what a cell of `compare` is found, judged and timed by."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from shoal.api.assess import planned, text_of, tokenizer_of
from shoal.api.budget import COUNTED, counted_budget, parse_budget
from shoal.api.heal import heal
from shoal.api.prune import prune
from shoal.api.pruned import Pruned
from shoal.api.study import Cell, Protocol, file_name
from shoal.api.task_scores import TaskSet, load_task_sets, task_scores
from shoal.atomic import write_atomically
from shoal.data import Data
from shoal.data.spelled import templated, told_apart
from shoal.errors import ShoalError
from shoal.evaluation import compare as agree
from shoal.evaluation import generation_check, perplexity, speed
from shoal.evaluation.peak_memory import peak_memory
from shoal.evaluation.time_model import Phase, TimeModel, fitted_time_model, time_model_of
from shoal.executing.weights import Tensors
from shoal.ledger import Ledger
from shoal.models.calls import device_of
from shoal.models.checkpoint import read_json
from shoal.models.load import Loaded
from shoal.plan import Plan, Spec, parse_plan
from shoal.plan.price import FIGURES, shares
from shoal.registry import get
from shoal.scores import Budget, Unit

DENSE = "dense"
QUALITY = ("perplexity", "nll", "tasks", "repetition", "kl", "top1")
"""Of a result: what depends on its plan alone."""


@dataclass
class Harness:
    """A model and all that its cells are measured on; made once for each process."""

    loaded: Loaded
    protocol: Protocol
    folder: Path
    tests: dict[str, Data]
    tasks: tuple[TaskSet, ...]
    budgets: dict[str, Budget] = field(default_factory=dict)
    qualities: Ledger[dict[str, Any]] = field(default_factory=Ledger)
    """Quality by plan and the digest of its weights: two methods may well find the same."""
    times: Ledger[dict[str, Any]] = field(default_factory=Ledger)
    """Times, in the same way."""
    memo: Ledger[Any] = field(default_factory=Ledger)
    """What plans scored in searches: those for a smaller budget begin as those for a larger one did."""

    @classmethod
    def of(cls, loaded: Loaded, protocol: Protocol, folder: Path) -> Harness:
        """Read all data before anything runs. Raises `DataError`."""
        asked = {"split": "test", "length": protocol.window, "limit": protocol.windows}
        template = protocol.chat_template
        named = told_apart(protocol.tests)
        tests = {name: text_of(loaded, templated(text, template), **asked) for text, name in named.items()}
        tasks = load_task_sets(protocol.tasks, limit=protocol.task_items)
        if tasks:
            tokenizer_of(loaded)
        return cls(loaded, protocol, folder, tests, tasks)

    def on(self, loaded: Loaded | None) -> Harness:
        """The same on this model; without one while it is handed to another process."""
        return replace(self, loaded=cast(Loaded, loaded))

    def calibration(self, seed: int) -> Data:
        """The first windows of the text for seed 0, a random choice of windows for any other."""
        asked = {"split": "calibrate", "length": self.protocol.length, "limit": self.protocol.limit}
        text = templated(self.protocol.data, self.protocol.chat_template)
        return text_of(self.loaded, text, **asked, seed=seed or None)

    def identity(self) -> Plan:
        """The plan of the whole model."""
        return Plan.identity(self.loaded.opened.spec)

    def facts(self) -> dict[str, Any]:
        """What makes results comparable."""
        return {
            "base": self.loaded.opened.spec.fingerprint,
            "source": self.loaded.source,
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "protocol": self.protocol.to_dict(),
            "calibration": self.calibration(0).info.sha256,
            "tests": {name: data.info.sha256 for name, data in self.tests.items()},
            "tasks": {tasks.name: tasks.sha256 for tasks in self.tasks},
        }

    def learn(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take over what other processes, or an earlier run, found out about plans."""
        for row in rows:
            result, measured = row.get("result", {}), row.get("measured", {})
            if "digest" in result:
                name = result["hash"] + result["digest"]
                if name not in self.qualities:
                    self.qualities.add(name, {part: result[part] for part in QUALITY if part in result})
                if "decode" in measured and name not in self.times:
                    self.times.add(name, {phase: measured[phase] for phase in ("prefill", "decode")})

    def row(self, cell: Cell | None) -> dict[str, Any]:
        """Run one cell but for its times, the dense model for None; an error that is the method's or the budget's
        becomes the row. `weights` are the tensors of its plan, for `timed`, which takes them out."""
        if cell is None:
            return {"key": DENSE, "result": self._quality(DENSE, nullcontext), "measured": {}}
        head = {"key": cell.key, "method": cell.method, "budget": cell.budget, "seed": cell.seed}
        if (file := get("methods", cell.name).file) is not None:
            head["file"] = file.to_dict()
        try:
            return head | self._cell(cell)
        except ShoalError as error:
            return head | {"error": str(error)}

    def _cell(self, cell: Cell) -> dict[str, Any]:
        data = self.calibration(cell.seed)
        budget = self.budget(cell.budget)
        start = time.perf_counter() + self.memo.saved
        with peak_memory(device_of(self.loaded.model)) as peak:
            pruned = prune(
                self.loaded,
                method=cell.name,
                budget=budget,
                data=data,
                seed=cell.seed,
                settings=cell.settings(),
                writable=self.protocol.writable,
                batch=self.protocol.batch,
                timed=False,
                memo=self.memo,
                journal=self.folder / "journals" / f"{file_name(cell.key)}.jsonl",
            )
        seconds = time.perf_counter() + self.memo.saved - start  # as if no other cell had been run
        measured = {"seconds": seconds, "peak": peak.growth}
        more: dict[str, Any] = {}
        if self.protocol.heal is not None:
            pruned, more["unhealed"], measured["healing"] = self._healed(pruned, cell.seed)
        weights, digest = pruned.found.weights, _digest(pruned.found.weights)
        name = pruned.plan.hash + digest
        variant = planned(self.loaded.model, pruned.plan, weights)
        quality = self.qualities.once(name, partial(self._quality, name, variant))
        result = self._plan(pruned) | {"digest": digest} | quality | more
        return {"result": result, "measured": measured, "weights": weights}

    def _healed(self, pruned: Pruned, seed: int) -> tuple[Pruned, float | None, float]:
        """The plan after healing, the perplexity on the first text that it had before, and the seconds."""
        before, start = None, time.perf_counter()
        healed = heal(
            self.loaded, pruned.plan, self.protocol.heal or "", weights=pruned.found.weights,
            tokens=self.protocol.heal_tokens, seed=seed,
            data=templated(self.protocol.data, self.protocol.chat_template),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        for text in list(self.tests.values())[:1]:
            with planned(self.loaded.model, pruned.plan, pruned.found.weights)():
                before = perplexity(self.loaded.model, text, batch=self.protocol.batch).value
        found = replace(pruned.found, plan=healed.plan, weights=healed.weights)
        return replace(pruned, plan=healed.plan, found=found), before, seconds

    def untimed(self, row: Mapping[str, Any]) -> bool:
        """Whether the row of a cell still lacks its times."""
        return bool(self.protocol.pairs) and "plan" in row.get("result", {}) and "decode" not in row["measured"]

    def timed(self, row: dict[str, Any], weights: Tensors) -> dict[str, Any]:
        """The row with its times, measured now unless the same plan with the same weights was timed before.

        Not a part of `row`, because two processes that time at once would time each other.
        """
        if not self.untimed(row):
            return row
        result = row["result"]
        name = result["hash"] + result["digest"]
        try:
            times = self.times.once(name, partial(self._times, result["plan"], weights))
        except ShoalError as error:
            head = {key: row[key] for key in ("key", "method", "budget", "seed", "file") if key in row}
            return head | {"error": str(error)}
        return row | {"measured": row["measured"] | times}

    def budget(self, text: str) -> Budget:
        """The budget of that text; the same one for all cells. Raises U523."""
        if text not in self.budgets:
            unit, share = parse_budget(text)
            spec = self.loaded.opened.spec
            counted = unit in COUNTED
            self.budgets[text] = (
                counted_budget(unit, share, spec) if counted else Budget(unit, share, self._time_model(unit, spec))
            )
        return self.budgets[text]

    def _time_model(self, unit: Unit, spec: Spec) -> TimeModel:
        """Measured once for a folder of results and kept there: a run that goes on, and one that is given the file,
        means the same by a budget."""
        path = self.folder / f"clock-{unit}.json"
        if path.is_file():
            return time_model_of(read_json(path), spec)
        phase: Phase = "prefill" if unit == "prefill" else "decode"
        model = fitted_time_model(self.loaded.model, phase, prompt=self.protocol.prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(model.to_dict(), indent=1))
        return model

    def _plan(self, pruned: Pruned) -> dict[str, Any]:
        assert pruned.price is not None
        of_dense = shares(pruned.after, pruned.before)
        return {
            "plan": str(pruned.plan),
            "hash": pruned.plan.hash,
            "weights": bool(pruned.found.weights),
            "price": pruned.price["price"],
            "params": FIGURES["params"](pruned.after),
            **{unit: of_dense[unit] for unit in ("layers", "kv", "flops")},
        }

    def _quality(self, name: str, variant: Any) -> dict[str, Any]:
        loaded, protocol, found = self.loaded, self.protocol, dict[str, Any]()
        with variant():
            for text, data in self.tests.items():
                worth = perplexity(loaded.model, data, batch=protocol.batch)
                found.setdefault("perplexity", {})[text] = worth.value
                found.setdefault("nll", {})[text] = {
                    "mean": worth.nll,
                    "error": worth.error,
                    "windows": worth.per_sequence,
                }
            scores = task_scores(loaded.model, loaded.tokenizer, self.tasks, batch=max(8, protocol.batch))
            if scores:
                found["tasks"] = {name: score.to_dict() for name, score in scores.items()}
            if protocol.new_tokens and loaded.tokenizer is not None:
                written = generation_check(loaded.model, loaded.tokenizer, new_tokens=protocol.new_tokens)
                found["repetition"] = written.repetition
        if name != DENSE and protocol.compared and self.tests:
            first = next(iter(self.tests.values()))
            part = Data(first.ids[: protocol.compared], None, first.info)
            both = agree(loaded.model, part, dense=nullcontext, pruned=variant, batch=protocol.batch)
            found |= {"kl": both.agreement.kl, "top1": both.agreement.top1}
        return found

    def _times(self, plan: str, weights: Tensors) -> dict[str, Any]:
        protocol, model = self.protocol, self.loaded.model
        timed = speed(
            {DENSE: planned(model, None), "pruned": planned(model, parse_plan(plan, self.identity()), weights)},
            prompt=protocol.prompt,
            new=protocol.decoded,
            batch=protocol.batch,
            pairs=protocol.pairs,
        )
        mine = timed.variants[1]
        ratios = {"prefill": mine.prefill_ratio, "decode": mine.decode_ratio}
        return {name: {"median": r.median, "low": r.low, "high": r.high} for name, r in ratios.items()}


def _digest(weights: Mapping[str, Any]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return f"+{total.hexdigest()}" if weights else ""
