"""What was computed and what it cost: values by key with their seconds, in memory and, where asked, in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Generic, NamedTuple, TypeVar

from shoal.record import append_line, read_objects

Value = TypeVar("Value")
Key = Hashable


class Ledger(Mapping[Key, Value], Generic[Value]):
    """Values by key, each computed once, with the seconds that it took.

    Searches on one model share a ledger: one that asks for what another computed is told at once, the same to the last
    bit. `saved` counts what that saved, so that wall clock plus `saved` is what a search would take alone.
    """

    def __init__(self, store: Store[Value] | None = None) -> None:
        self.saved = 0.0
        """Seconds of values that were taken from here instead of being computed again."""
        self.spent = 0.0
        """Seconds of all entries, those of earlier runs in the file too."""
        self.heard: Callable[[Key, Value], None] | None = None
        """Called with what is added, once it is kept."""
        self._entries: dict[Key, tuple[Value, float]] = {}
        self._store = store
        self._clock: Callable[[], float] | None = None
        self._since = 0.0
        for key, value, spent in store.entries() if store is not None else ():
            self._entries[key] = value, max(0.0, spent - self.spent)
            self.spent = max(self.spent, spent)

    def __getitem__(self, key: Key) -> Value:
        return self._entries[key][0]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def seconds(self, key: Key) -> float:
        """What the value took."""
        return self._entries[key][1]

    def reuse(self, keys: Iterable[Key]) -> None:
        """Count these entries as saved: they are used instead of being computed again."""
        self.saved += math.fsum(map(self.seconds, keys))

    def once(self, key: Key, compute: Callable[[], Value]) -> Value:
        """The value, computed and timed unless it is known."""
        if key in self:
            self.reuse([key])
        else:
            begun = perf_counter()
            value = compute()
            self.add(key, value, perf_counter() - begun)
        return self[key]

    def add(self, key: Key, value: Value, seconds: float | None = None) -> None:
        """Keep a value, and write its line. Without `seconds` it took the time since the entry before it, or since
        `working` began. Of two entries with one key the later counts."""
        took = self._elapsed() if seconds is None else seconds
        self.spent += took
        self._entries[key] = value, took
        if self._store is not None:
            self._store.append(key, value, self.spent)
        if self.heard is not None:
            self.heard(key, value)

    @contextmanager
    def working(self, clock: Callable[[], float] = perf_counter) -> Iterator[None]:
        """The time inside is spent on the entries that are added there; `clock` tells it in seconds."""
        self._clock, self._since = clock, clock()
        try:
            yield
        finally:
            self.spent += self._elapsed()
            self._clock = None

    def _elapsed(self) -> float:
        if self._clock is None:
            return 0.0
        now = self._clock()
        took, self._since = now - self._since, now
        return took


class StoredEntry(NamedTuple, Generic[Value]):
    """One entry of a file."""

    key: Key
    value: Value
    spent: float
    """Seconds of all entries up to this one."""


class Store(Generic[Value]):
    """A ledger's file of JSON lines: a header of facts, then one line for each entry, written in one call each.

    A line that a kill cut short is passed over. `read` takes a line to its entry, None for one that is no entry;
    `write` takes an entry (key, value, seconds of all entries up to it) to its line. Raises `OSError`.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[Mapping[str, Any]], StoredEntry[Value] | None],
        write: Callable[[Key, Value, float], dict[str, Any]],
    ) -> None:
        self.path, self._read, self._write = path, read, write
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = read_objects(path)
        self.header: Mapping[str, Any] | None = lines[0] if lines else None
        """The first line of the file; None for a new one."""
        self._lines = lines[1:]

    def begin(
        self, facts: Mapping[str, Any], *, tolerance: float = 0.0, notes: Mapping[str, Any] | None = None
    ) -> str | None:
        """Write the header of a new file; of one that is there the name of the first fact that differs, if any does.
        Numbers may differ by `tolerance` of their size. `notes` are written behind the facts and not compared."""
        if self.header is None:
            self.header = {**facts, **(notes or {})}
            append_line(self.path, dict(self.header))
            return None
        wanted, there = json.loads(json.dumps(facts)), self.header
        return next((name for name in wanted if not _same(there.get(name), wanted[name], tolerance)), None)

    def entries(self) -> Iterator[StoredEntry[Value]]:
        """What the lines of the file hold, in their order."""
        for line in self._lines:
            found = self._read(line)
            if found is not None:
                yield found

    def append(self, key: Key, value: Value, spent: float) -> None:
        """Add the line of an entry."""
        append_line(self.path, self._write(key, value, spent))


def _same(there: Any, wanted: Any, tolerance: float) -> bool:
    if tolerance and isinstance(wanted, float):
        return math.isclose(number(there), wanted, rel_tol=tolerance)
    return bool(there == wanted)


def number(value: Any) -> float:
    """A number of a line; NaN for what is none, as JSON has no word for what is not finite."""
    return float(value) if isinstance(value, int | float) else math.nan
