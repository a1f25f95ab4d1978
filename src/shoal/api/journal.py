"""A search that was cut off goes on where it was: every evaluated plan is one line in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.data import Data
from shoal.errors import DataError
from shoal.evaluate import Progress, sequence_nll
from shoal.plan import Plan
from shoal.run.live import running
from shoal.scores import Objective


def mean_nll(model: Any, data: Data, *, batch: int = 1) -> float:
    """Cross-entropy in nats per token of the model as it runs now."""
    scored = sequence_nll(model, data, batch=batch)
    return math.fsum(total for total, _ in scored) / sum(count for _, count in scored)


def journaled(
    model: Any, identity: Plan, *, path: Path | None = None, batch: int = 1, progress: Progress | None = None
) -> Callable[[Data], Objective]:
    """Data -> objective: the cross-entropy of a plan on them, each plan evaluated once.

    With `path` the values are kept in a JSON-lines file. Its first line names the data, the model's structure and the
    dense value, which is computed anew at every start, so that a journal of other weights is refused (D430).
    """

    def on(data: Data) -> Objective:
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
    head = {
        "journal": "shoal-journal/1",
        "base": identity.base.fingerprint,
        "data": data.info.sha256,
        "dense": mean_nll(model, data, batch=batch),
    }
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, head)
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        found = json.loads(lines[0])
        same = found.keys() == head.keys() and all(found[k] == head[k] for k in ("journal", "base", "data"))
        if not same or not math.isclose(found["dense"], head["dense"], rel_tol=1e-4):
            raise DataError(f"the journal {path} belongs to another model or other data; name another file", code="D430")
        known: dict[str, float] = {}
        for line in lines[1:]:
            entry = _whole(line)
            if entry is not None:
                known[entry["plan"]] = float(entry["nll"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise DataError(f"{path} is not a journal of Shoal; name another file", code="D430") from None
    return known


def _whole(line: str) -> dict[str, Any] | None:
    """The entry of a line; None for one that a kill cut short."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and {"plan", "nll"} <= entry.keys() else None


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a+", encoding="utf-8") as stream:
        stream.seek(0, 2)
        if stream.tell() and not _ends_line(path):
            stream.write("\n")
        stream.write(json.dumps(entry) + "\n")


def _ends_line(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, 2)
        return stream.read(1) == b"\n"
