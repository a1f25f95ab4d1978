"""Files of the versions before are gone on with: a journal, one of a method's own objective, and finished cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.api.comparison_file import ComparisonFile
from shoal.api.journal import journaled, kept
from shoal.errors import DataError
from shoal.evaluation.plan_loss import PlanLoss
from shoal.ledger import Ledger
from shoal.models.inspect import inspect
from shoal.plan import Plan, drop
from shoal.search.greedy import greedy

from .families import tiny
from .planted import random_data

BASE = "sha256:c14100ba9123c9480047fda38d49585564d5381661b00d3a6d209d19dd5c5c44"
JOURNAL = (
    {"journal": "shoal-journal/1", "base": BASE, "data": "DATA", "dense": 4.519057655831178},
    {"lost": "1-3", "race": "8f1deb985615c652", "batches": 15, "spent": 1.263},
    {"plan": "0,2-3", "nll": 4.52431292583545, "spent": 1.359},
    {"plan": "0-1,3", "nll": 4.546701380610466, "spent": 1.359},
    {"plan": "0-2", "nll": 4.5163716857632, "spent": 1.359},
    {"plan": "1-2", "nll": 4.5296913060049215, "spent": 2.408},
    {"plan": "0,2", "nll": 4.502320315440496, "spent": 2.409},
    {"plan": "0-1", "nll": 4.5281622568766275, "spent": 2.409},
)
"""Of a greedy search on the tiny Llama that raced, written by 0.1.0 as it was before there was a ledger."""
OWN = (
    {"journal": "shoal-journal/1", "base": BASE, "data": "depth", "dense": 4.0},
    {"plan": "1-3", "nll": None, "spent": 0.5},
    {"plan": "0,2-3", "nll": 3.0, "spent": 0.75},
)
CELLS = (
    {"compare": "shoal-compare/1", "base": BASE, "source": "tiny", "protocol": {"tests": ["builtin"], "length": 16}},
    {"key": "dense", "result": {"perplexity": {"builtin": 451.8342349113261}}, "measured": {}},
    {"key": "position layers=0.8 seed=0", "method": "position", "budget": "layers=0.8", "seed": 0, "error": "U502: no"},
    {"key": "position layers=0.8 seed=0", "method": "position", "budget": "layers=0.8", "seed": 0, "result": {}},
)


def written(path: Path, lines: Any, *, torn: str = "") -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + torn)
    return path


def test_a_search_goes_on_from_an_old_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny("llama"), random_data(32, 16)
    whole, memo = Plan.identity(inspect(model)), Ledger[Any]()
    head = {**JOURNAL[0], "data": data.info.sha256}
    path = written(tmp_path / "journal.jsonl", (head, *JOURNAL[1:]), torn='{"plan": "0", "nl')
    before = path.read_bytes()
    objective = journaled(model, whole, path=path, batch=2, memo=memo)(data)
    assert memo.saved == 2.409
    monkeypatch.setattr(PlanLoss, "parts", lambda *_, **__: pytest.fail("a plan in the journal was run again"))
    found = greedy(whole, objective=objective, drop=2, legal=lambda plan: True)
    assert [(one.notation, one.score) for one in found.trace] == [("0-2", 4.5163716857632), ("0,2", 4.502320315440496)]
    assert path.read_bytes() == before
    monkeypatch.undo()
    objective(drop(whole, [0, 1]))
    assert path.read_bytes().startswith(before)
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["plan"] == "2-3" and last["spent"] > 2.409


def test_a_methods_own_objective_goes_on_from_an_old_journal(tmp_path: Path) -> None:
    plan = Plan.identity(inspect(tiny("llama")))
    asked: list[str] = []

    def depth(candidate: Plan) -> float:
        asked.append(str(candidate))
        return float(len(candidate.layers()))

    own = kept(depth, "depth", plan, path=written(tmp_path / "own.jsonl", OWN))
    assert own(drop(plan, [1])) == 3.0 and own(drop(plan, [0])) != own(drop(plan, [0])), "null is what is not finite"
    assert asked == [str(plan)]
    assert own(drop(plan, [2])) == 3.0
    last = json.loads((tmp_path / "own.jsonl").read_text().splitlines()[-1])
    assert last["plan"] == "0-1,3" and last["spent"] >= 0.75


def test_a_comparison_goes_on_from_old_cells(tmp_path: Path) -> None:
    path = written(tmp_path / "cells.jsonl", CELLS, torn='{"key": "slow')
    facts = {name: value for name, value in CELLS[0].items() if name != "compare"}
    cells = ComparisonFile(tmp_path, facts)
    assert dict(cells.done) == {"dense": CELLS[1], "position layers=0.8 seed=0": CELLS[3]}
    cells.add({"key": "new", "result": {"kl": float("inf")}})
    assert json.loads(path.read_text().splitlines()[-1]) == {"key": "new", "result": {"kl": None}}
    assert list(ComparisonFile(tmp_path, facts).done) == ["dense", "position layers=0.8 seed=0", "new"]
    with pytest.raises(DataError, match=r"D460.*its source differs"):
        ComparisonFile(tmp_path, {**facts, "source": "another"})
