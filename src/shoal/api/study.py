"""What `compare` compares: every method at every budget with every seed, on one split of data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from shoal.api.budget import parse_budget, refuse_amount
from shoal.errors import UsageError
from shoal.registry import entries, get
from shoal.spelling import chosen, read


@dataclass(frozen=True, slots=True)
class Cell:
    """One method at one budget with one seed."""

    method: str
    """Its name and options, as `position:which=first` or `./mine.py:share=0.5`."""
    budget: str
    """Unit and share, as `params=0.8`."""
    seed: int

    @property
    def key(self) -> str:
        """What the cell is called in the file of results; a user's own file goes by its text, wherever it lies."""
        file, (_, separator, options) = get("methods", self.name).file, self.method.partition(":")
        name = self.name if file is None else f"{file.function}@{file.sha256[:12]}"
        return f"{name}{separator}{options} {self.budget} seed={self.seed}"

    @property
    def name(self) -> str:
        """The method's registered name."""
        return read(self.method).name

    def settings(self) -> dict[str, Any]:
        """The method's options. Raises U501 or U502 for what does not exist."""
        return chosen("methods", self.method)[1]


@dataclass(frozen=True, slots=True)
class Protocol:
    """On what every cell is calibrated, tested and timed; part of the results, which are of one protocol."""

    data: str = "builtin"
    """Calibration text (its `calibrate` split, if it has splits)."""
    tests: tuple[str, ...] = ("builtin",)
    tasks: tuple[str, ...] = ()
    """.jsonl files of last words or multiple choice, see `shoal.evaluation.tasks`, or names of lm-eval."""
    length: int = 512
    limit: int = 16
    window: int = 512
    windows: int = 16
    compared: int = 4
    """Windows of the first test text on which KL and top-1 agreement with the dense model are taken."""
    task_items: int = 200
    new_tokens: int = 64
    """Of the generation check; 0 leaves it out."""
    prompt: int = 256
    decoded: int = 32
    pairs: int = 3
    """Rounds of the paired timing; 0 leaves it out."""
    batch: int = 1
    writable: bool = False
    """Only plans that a stock class can express."""
    chat_template: str | None = None
    """For conversations in `data` and `tests`, in place of the model's own, see `shoal.load_data`."""
    heal: str | None = None
    """A recipe by which each plan is healed before it is judged, on `data`."""
    heal_tokens: int | None = None
    """Of each; the same for all, so that what is compared is what they make of them."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what former versions did not have is left out where it is not used."""
        newer = ("chat_template", "heal", "heal_tokens")
        return {key: value for key, value in asdict(self).items() if key not in newer or value is not None}


class ExpectedSeconds:
    """Cell -> what is known of how long it will take, the largest first: longest first keeps all workers busy."""

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._seconds: dict[str, float] = {}
        for row in rows:
            self.learn(row)

    def learn(self, row: Mapping[str, Any]) -> None:
        """Take note of a cell that is done."""
        if "method" in row:
            took = row.get("measured", {}).get("seconds", 0.0)
            self._seconds[row["method"]] = max(took, self._seconds.get(row["method"], 0.0))

    def group(self, cell: Cell | None) -> tuple[str, int] | None:
        """Cells whose searches begin alike: those of a method that searches, with one seed."""
        searches = cell is not None and get("methods", cell.name).searches
        return (cell.method, cell.seed) if cell is not None and searches else None

    def __call__(self, cell: Cell | None) -> tuple[float, bool, float]:
        """A method that nothing is known of yet comes before the others, among them those that evaluate many plans;
        then the smaller budget, which takes more steps."""
        if cell is None:
            return math.inf, True, 1.0
        searches = get("methods", cell.name).searches
        return self._seconds.get(cell.method, math.inf), searches, 1 - parse_budget(cell.budget)[1]


def cells(methods: Sequence[str], budgets: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Every cell, cheapest mistakes first: all names, options and budgets are looked at before anything runs.

    `methods`: names, with options behind a colon (`position:which=first,x=y`); none for all that remove something.
    `budgets`: `UNIT=SHARE`, several shares parted by commas. Raises U501, U502, U523, U665 for a method that grows the
    model, U570 when there is nothing to do.
    """
    known = [name for name, entry in entries("methods").items() if entry.removes]
    named = list(dict.fromkeys(name.strip() for name in methods)) or known
    asked = list(dict.fromkeys(one for text in budgets for one in _shares(text)))
    if not named or not asked or not seeds:
        raise UsageError("nothing to compare: give a budget such as params=0.8,0.7, and one seed or more", code="U570")
    found = [Cell(method, budget, seed) for budget, seed, method in product(asked, dict.fromkeys(seeds), named)]
    for cell in found[: len(named)]:
        if not get("methods", cell.name).removes:
            refuse_amount(cell.name, cell.budget)
        cell.settings()
    return found


def _shares(text: str) -> list[str]:
    unit, _, shares = text.partition("=")
    found = [f"{unit.strip()}={share.strip()}" for share in shares.split(",")]
    for one in found:
        parse_budget(one)
    return found


def file_name(key: str) -> str:
    """A name for the own files of the cell with this key."""
    return "".join(char if char.isalnum() or char in "-.=" else "_" for char in key)


def full_paths(names: Sequence[str | Path]) -> tuple[str, ...]:
    """Files by their full path, so that results can be gone on with from another folder; other names as they are."""
    there = [Path(name).expanduser() for name in names]
    return tuple(str(path.resolve() if path.exists() else name) for name, path in zip(names, there, strict=True))
