"""The ledger: values once, seconds that add up, and a file that survives being cut off."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shoal.ledger import Key, Ledger, Store, StoredEntry, number

FACTS = {"format": "test/1", "of": "a model", "value": 1.5}


def read(line: Mapping[str, Any]) -> StoredEntry[float] | None:
    return StoredEntry(str(line["key"]), number(line["value"]), float(line["spent"])) if "key" in line else None


def write(key: Key, value: float, spent: float) -> dict[str, Any]:
    return {"key": key, "value": value, "spent": spent}


def store(path: Path) -> Store[float]:
    return Store(path, read, write)


def test_a_value_is_computed_once_and_what_that_saves_is_counted() -> None:
    ledger, asked = Ledger[float](), list[str]()

    def compute() -> float:
        asked.append("x")
        return 2.0

    assert ledger.once("x", compute) == ledger.once("x", compute) == ledger["x"] == 2.0
    assert asked == ["x"] and len(ledger) == 1 and list(ledger) == ["x"] and "y" not in ledger
    assert ledger.saved == ledger.seconds("x") == ledger.spent > 0
    with pytest.raises(ZeroDivisionError):
        ledger.once("y", lambda: 1 / 0)
    assert "y" not in ledger, "what failed is asked again"


def test_seconds_belong_to_the_entries_and_the_work_between_them() -> None:
    now, ledger = 10.0, Ledger[str]()

    def clock() -> float:
        return now

    with ledger.working(clock):
        now += 1
        ledger.add("a", "A")
        now += 2
        ledger.add("b", "B")
        now += 4
    now += 100
    assert (ledger.seconds("a"), ledger.seconds("b"), ledger.spent) == (1, 2, 7)
    with ledger.working(clock):
        now += 0.5
        ledger.add("c", "C")
    ledger.add("d", "D", 3)
    assert (ledger.seconds("c"), ledger.spent) == (0.5, 10.5)
    ledger.reuse(["a", "b"])
    ledger.reuse([])
    assert ledger.saved == 3
    assert ledger.spent == 10.5, "what is reused is not spent again"


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.jsonl"
    first = store(path)
    assert first.header is None and first.begin(FACTS) is None
    ledger = Ledger(first)
    ledger.add("a", 1.0, 2.0)
    ledger.add("b", math.nan, 0.5)
    again = store(path)
    assert again.header == FACTS and again.begin(FACTS) is None
    found = Ledger(again)
    assert found["a"] == 1.0 and math.isnan(found["b"])
    assert (found.seconds("a"), found.seconds("b"), found.spent, found.saved) == (2.0, 0.5, 2.5, 0.0)
    found.add("a", 3.0, 1.0)
    assert Ledger(store(path))["a"] == 3.0, "of two lines with one key the later counts"
    assert [json.loads(line) for line in path.read_text().splitlines()][2] == {"key": "b", "value": None, "spent": 2.5}


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_line_that_a_kill_cut_short_is_dropped_and_the_next_one_is_whole(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "l"
    ledger = Ledger(store(path))
    store(path).begin(FACTS)
    for name in "ab":
        ledger.add(name, 1.0, 1.0)
    path.write_bytes(path.read_bytes()[:-cut])
    found = Ledger(store(path))
    assert list(found) == (["a", "b"] if cut == 1 else ["a"]), "without its line end alone the line is whole"
    found.add("c", 2.0, 1.0)
    assert list(Ledger(store(path))) == [*found]


@pytest.mark.parametrize(("name", "value"), [("of", "another"), ("value", 1.6), ("format", None)])
def test_the_first_fact_that_differs_is_named_and_the_file_left_alone(name: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "l"
    assert store(path).begin(FACTS) is None
    before = path.read_bytes()
    assert store(path).begin({**FACTS, name: value}) == name
    assert store(path).begin({**FACTS, "more": 1}) == "more"
    assert path.read_bytes() == before
    assert store(path).begin({**FACTS, "value": 1.50001}, tolerance=1e-4) is None
    assert store(path).begin({**FACTS, "value": 1.501}, tolerance=1e-4) == "value"
    assert store(path).begin({**FACTS, "value": math.nan}, tolerance=1e-4) == "value", "not a number is no agreement"


def test_a_place_where_no_file_can_be_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "l"):
        with pytest.raises(OSError, match=r"."):
            store(path)


def test_a_ledger_in_memory_can_be_copied_to_another_process() -> None:
    ledger = Ledger[float]()
    ledger.add(("a", 1), 2.0, 3.0)
    ledger.reuse([("a", 1)])
    other = copy.deepcopy(ledger)
    assert dict(other) == dict(ledger) and (other.saved, other.spent) == (3.0, 3.0)
