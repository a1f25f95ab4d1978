"""A search that was cut off goes on where it was: every evaluated plan is one line in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.data import Data
from shoal.errors import DataError
from shoal.evaluation import sequence_nll
from shoal.models.kinds import require_causal
from shoal.plan import Plan
from shoal.record import plain
from shoal.run.live import running
from shoal.scores import Objective

FORMAT = "shoal-journal/1"


def mean_nll(model: Any, data: Data, *, batch: int = 1) -> float:
    """Cross-entropy in nats per token of the model as it runs now."""
    scored = sequence_nll(model, data, batch=batch)
    return math.fsum(total for total, _ in scored) / sum(count for _, count in scored)


def journaled(model: Any, identity: Plan, *, path: Path | None = None, batch: int = 1) -> Callable[[Data], Objective]:
    """Data -> objective: the cross-entropy of a plan on them, each plan evaluated once.

    With `path` the values are kept in a JSON-lines file (null for what is not finite). Its first line names the data,
    the model's structure and the dense value, which is computed anew at every start, so that a journal of other weights
    is refused (D430).
    """

    def on(data: Data) -> Objective:
        require_causal(model, "a search by cross-entropy")
        known = _open(path, model, identity, data, batch) if path is not None else {}

        def objective(plan: Plan) -> float:
            key = str(plan)
            if key not in known:
                with running(model, plan):
                    known[key] = mean_nll(model, data, batch=batch)
                if path is not None:
                    _append(path, {"plan": key, "nll": known[key]})
            return known[key]

        return objective

    return on


def _open(path: Path, model: Any, identity: Plan, data: Data, batch: int) -> dict[str, float]:
    """The values in the journal; a new journal gets its first line."""
    lines = _lines(path)
    facts = {"journal": FORMAT, "base": identity.base.fingerprint, "data": data.info.sha256}
    head = _object(lines[0]) if lines else {}
    if lines and head.get("journal") != FORMAT:
        raise DataError(f"{path} is not a journal of Shoal; name another file", code="D430")
    dense = mean_nll(model, data, batch=batch)
    if not lines:
        _append(path, {**facts, "dense": dense})
        return {}
    before = _number(head.get("dense"))
    if any(head.get(name) != value for name, value in facts.items()) or not math.isclose(before, dense, rel_tol=1e-4):
        raise DataError(f"the journal {path} belongs to another model or other data; name another file", code="D430")
    entries = [_object(line) for line in lines[1:]]
    return {str(entry["plan"]): _number(entry["nll"]) for entry in entries if {"plan", "nll"} <= entry.keys()}


def _lines(path: Path) -> list[str]:
    """The lines of a journal; none if there is no file yet. Raises D430 for what cannot be read."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise DataError(f"cannot keep a journal at {path} ({error.strerror}); name another file", code="D430") from None


def _object(line: str) -> dict[str, Any]:
    """What a line holds; empty for one that a kill cut short, or that is no JSON object."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _append(path: Path, entry: dict[str, Any]) -> None:
    """Add a line in one write, behind the end of one that was cut short."""
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("ab", buffering=0) as stream:
        stream.write((b"" if whole else b"\n") + json.dumps(plain(entry), allow_nan=False).encode() + b"\n")
