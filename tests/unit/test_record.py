"""Records: plain data, one whole line each, and what is known about this machine."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pytest

from shoal.record import Record, append, command_line, environment, plain


def test_what_is_not_finite_becomes_none_all_through() -> None:
    value = {
        "a": math.nan,
        "b": [1.5, -math.inf, (math.inf, 2)],
        "c": {"d": math.nan},
        "e": "nan",
        "f": None,
        "g": True,
    }
    assert plain(value) == {"a": None, "b": [1.5, None, [None, 2]], "c": {"d": None}, "e": "nan", "f": None, "g": True}


def test_a_record_says_where_and_when_it_was_made() -> None:
    record = Record("test", {"value": 1.0})
    assert record.environment["torch"] == version("torch")
    assert record.environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert datetime.fromisoformat(record.time).utcoffset() is not None
    assert record.plan is None


def test_a_record_cannot_change_what_the_next_one_says() -> None:
    Record("test", {}).environment["torch"] = "none"
    assert environment()["torch"] == version("torch")


def test_records_are_appended_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    for number in range(3):
        append(path, Record("test", {"number": number, "bad": math.nan, "name": "Größe\n"}, command=("shoal", "prune")))
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) for line in lines]
    assert [record["numbers"]["number"] for record in found] == [0, 1, 2]
    assert found[0]["numbers"] == {"number": 0, "bad": None, "name": "Größe\n"}
    assert found[0]["command"] == ["shoal", "prune"]


def test_a_record_that_is_no_json_leaves_no_line(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        append(tmp_path / "records.jsonl", Record("test", {"object": object()}))
    assert not (tmp_path / "records.jsonl").exists()


def test_the_command_shows_no_folder_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/shoal", "prune", "smollm2", "--drop", "2"])
    assert command_line() == ("shoal", "prune", "smollm2", "--drop", "2")


def test_a_record_costs_no_heavy_import() -> None:
    code = "import sys; from shoal.record import Record; Record('x', {}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
