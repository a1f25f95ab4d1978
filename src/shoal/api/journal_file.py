"""The file of a journal: a first line that says what it belongs to, then one for each plan that was evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shoal.errors import DataError
from shoal.ledger import Key, Ledger, Store, StoredEntry, number

FORMAT = "shoal-journal/1"


class DroppedPlan(NamedTuple):
    """The key of a plan that was dropped in a race; its value is the number of batches that it saw. The key of a plan
    that was evaluated is its text."""

    race: str
    plan: str


def open_journal(
    path: Path | None, base: str, data: str, dense: Callable[[], float], text: str | None = None
) -> Ledger[float]:
    """The ledger of a journal; without a `path` one in memory. A new file gets its first line: the fingerprint of the
    model, the hash of the data or the name of the objective, the `dense` model's value, and `text`, the data in words.

    Raises D430 for a file that cannot be read or written, is no journal, or is one of something else.
    """
    if path is None:
        return Ledger()
    store = _store(path)
    if store.header is not None and store.header.get("journal") != FORMAT:
        raise DataError(f"{path} is not a journal of Shoal; name another file", code="D430")
    facts = {"journal": FORMAT, "base": base, "data": data, "dense": dense()}
    if store.begin(facts, tolerance=1e-4, notes={} if text is None else {"text": text}) is not None:
        raise DataError(f"the journal {path} belongs to another model or other data; name another file", code="D430")
    return Ledger(store)


def spent_in(path: Path) -> float:
    """Seconds that the entries of a journal took; 0 if there is no file yet. Raises D430 for what cannot be read."""
    return Ledger(_store(path)).spent


def _store(path: Path) -> Store[float]:
    try:
        return Store(path, _entry, _line)
    except OSError as error:
        raise DataError(f"cannot keep a journal at {path} ({error.strerror}); name another file", code="D430") from None


def _entry(line: Mapping[str, Any]) -> StoredEntry[float] | None:
    spent = line.get("spent")
    seconds = float(spent) if isinstance(spent, int | float) else 0.0
    if {"lost", "race"} <= line.keys():
        return StoredEntry(DroppedPlan(str(line["race"]), str(line["lost"])), number(line.get("batches")), seconds)
    if {"plan", "nll"} <= line.keys():
        return StoredEntry(str(line["plan"]), number(line["nll"]), seconds)
    return None


def _line(key: Key, value: float, spent: float) -> dict[str, Any]:
    seconds = round(spent, 3)
    if isinstance(key, DroppedPlan):
        return {"lost": key.plan, "race": key.race, "batches": int(value), "spent": seconds}
    return {"plan": str(key), "nll": value, "spent": seconds}
