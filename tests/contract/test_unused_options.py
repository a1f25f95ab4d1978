"""What is typed and changes nothing gets a word: a note on stderr, and the run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import shoal
from shoal.cli import app
from shoal.errors import ShoalWarning
from shoal.models.load import Loaded

from .test_api import folder  # noqa: F401

QUICK = ["--length", "32", "--limit", "2"]
POSITION = ["prune", "MODEL", "-m", "position", "--drop", "1"]

UNUSED: list[tuple[list[str], tuple[str, ...]]] = [
    (["measure", "MODEL", "-m", "magnitude", "--data", "TEXT"], ("data=TEXT",)),
    (
        ["measure", "MODEL", "-m", "spectrum", *QUICK, "--seed", "3", "--lowest", "2"],
        ("--length", "--limit", "--seed", "--lowest"),
    ),
    (["measure", "MODEL", "-m", "magnitude", "-m", "block-influence", *QUICK, "--data", "TEXT"], ("data=TEXT",)),
    ([*POSITION, "--data", "TEXT", *QUICK, "--no-assess"], ("data=TEXT", "--length", "--limit")),
    ([*POSITION, "--no-assess", "--journal", "JOURNAL", "--workers", "3"], ("--journal", "--workers")),
    ([*POSITION, "--no-assess", "--overwrite", "--test-data", "TEXT"], ("--overwrite", "--test-data")),
    (
        ["prune", "MODEL", "--plan", "0-2,4", "--no-assess", "-m", "position", "--data", "TEXT"],
        ("data=TEXT", "--method"),
    ),
    (["generate", "MODEL", "a", "--max-new-tokens", "1", "--temperature", "0.5"], ("--temperature",)),
    (["generate", "MODEL", "a", "--max-new-tokens", "1", "--draft-length", "2"], ("--draft-length",)),
    (
        ["evaluate", "MODEL", "--window", "32", "--limit", "1", "--no-generation", "--new-tokens", "9"],
        ("--new-tokens",),
    ),
    (["evaluate", "MODEL", "--dry-run", "--task-items", "9"], ("--task-items",)),
    (["fuse", "MODEL", "--plan", "0-2,4", "--with", "refit", "--dry-run", "--overwrite"], ("--overwrite",)),
    (["bench", "MODEL", "--policy", "exit", "--prompt", "9", "--dry-run"], ("--prompt",)),
    (["calibrate", "MODEL", "--dry-run", "--cap", "2"], ("--cap",)),
    (["doctor", "MODEL", "--shard-size", "1GB"], ("--shard-size",)),
]


def said(words: list[str], model: Path, place: Path) -> tuple[str, str]:
    text = place / "own.txt"
    text.write_text("a few words of its own, again and again; " * 40, encoding="utf-8")
    names = {"MODEL": str(model), "TEXT": str(text), "JOURNAL": str(place / "journal.jsonl")}
    result = CliRunner().invoke(app, [names.get(word, word) for word in words], prog_name="shoal")
    assert result.exit_code == 0, f"{result.output}{result.stderr}{result.exception!r}"
    return result.stdout, result.stderr.replace(str(text)[:60], "TEXT")


@pytest.mark.parametrize(("words", "unused"), UNUSED, ids=[" ".join(words[:4]) for words, _ in UNUSED])
def test_what_has_no_effect_gets_a_note(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    words: list[str],
    unused: tuple[str, ...],
) -> None:
    stderr = said(words, folder, tmp_path)[1].splitlines()
    assert {line.split()[3] for line in stderr if line.startswith("shoal: note: U655: ")} == set(unused)
    assert len(stderr) == len(unused)


def test_what_has_an_effect_gets_none(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    used = [
        ["measure", "MODEL", "--data", "TEXT", *QUICK],
        [*POSITION, "--no-assess"],
        [*POSITION, "--no-assess", "--then", "refit", "--data", "TEXT", *QUICK, "-q"],
        ["generate", "MODEL", "a", "--max-new-tokens", "1", "--sample", "--temperature", "0.5", "--seed", "3"],
    ]
    for words in used:
        assert said(words, folder, tmp_path)[1] == "", words


def test_the_seed_of_a_measure_chooses_the_windows(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    values = []
    for seed in ("0", "1", "1"):
        stdout, _ = said(["measure", "MODEL", "--seed", seed, *QUICK, "--json"], folder, tmp_path)
        values.append(json.loads(stdout)["values"])
    assert values[0] != values[1] == values[2]


def test_python_callers_are_warned(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    loaded: Loaded = shoal.load(folder)
    with pytest.warns(ShoalWarning, match="U655: data=my.txt has no effect here, as the measure magnitude reads no"):
        shoal.measure(loaded, "magnitude", data="my.txt")
    with pytest.warns(ShoalWarning, match=r"U655: data=\['words'\]"):
        shoal.prune(loaded, plan="0-2,4", data=["words"], writable=False)


@pytest.mark.parametrize(("row", "values"), [("1,3,0.2,9", 4), ("1,3", 2)])
def test_a_table_with_a_wrong_number_of_columns_is_refused(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    row: str,
    values: int,
) -> None:
    table = tmp_path / "distances.csv"
    table.write_text(f"block_start,block_end,average_distance\n1,3,0.4\n{row}\n", encoding="utf-8")
    words = ["convert", str(table), "--from", "pruneme", "--to", "notation", "--model", str(folder)]
    result = CliRunner().invoke(app, words, prog_name="shoal")
    assert result.exit_code == 1
    assert f"N101: line 3 of the pruneme file has {values} values and its first line names 3" in result.stderr
