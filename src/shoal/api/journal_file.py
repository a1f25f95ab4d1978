"""The file of a journal: a first line that says what it belongs to, then one for each plan that was evaluated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shoal.errors import DataError
from shoal.record import append_line, read_objects

FORMAT = "shoal-journal/1"


def open_journal(
    path: Path, base: str, data: str, dense: Callable[[], float]
) -> tuple[dict[str, float], dict[str, set[str]], float]:
    """The values in the journal, what lost in which race, the seconds it took; a new journal gets its first line: the
    fingerprint of the model, the hash of the data or the name of the objective, and the `dense` model's value.

    Raises D430 for a file that cannot be read or written, is no journal, or is one of something else.
    """
    lines = journal_lines(path)
    facts = {"journal": FORMAT, "base": base, "data": data}
    head = lines[0] if lines else {}
    if lines and head.get("journal") != FORMAT:
        raise DataError(f"{path} is not a journal of Shoal; name another file", code="D430")
    value = dense()
    if not lines:
        append_line(path, {**facts, "dense": value})
        return {}, {}, 0.0
    before = _number(head.get("dense"))
    if any(head.get(name) != value for name, value in facts.items()) or not math.isclose(before, value, rel_tol=1e-4):
        raise DataError(f"the journal {path} belongs to another model or other data; name another file", code="D430")
    entries = lines[1:]
    lost: dict[str, set[str]] = {}
    for entry in entries:
        if {"lost", "race"} <= entry.keys():
            lost.setdefault(str(entry["race"]), set()).add(str(entry["lost"]))
    known = {str(entry["plan"]): _number(entry["nll"]) for entry in entries if {"plan", "nll"} <= entry.keys()}
    return known, lost, spent_of(entries)


def spent_of(lines: Sequence[dict[str, Any]]) -> float:
    """Seconds that evaluating took until the last of these lines."""
    return max((float(line["spent"]) for line in lines if isinstance(line.get("spent"), int | float)), default=0.0)


def journal_lines(path: Path) -> list[dict[str, Any]]:
    """What the lines of a journal hold; none if there is no file yet. Raises D430 for what cannot be read."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return read_objects(path)
    except OSError as error:
        raise DataError(f"cannot keep a journal at {path} ({error.strerror}); name another file", code="D430") from None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
