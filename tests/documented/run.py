"""Runs the commands and blocks of a page, in its order, in a folder prepared by `place.py`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from shoal.cli import VERBS, app

from .place import stand_ins
from .standins import BLOCKS, COMPLETE, PUT, REFUSED, SLOW, WORDS, why_not
from .texts import Block, Command, commands, python_blocks

NAMES = {verb.__name__.replace("_", "-") for verb in VERBS}
PLACES = ("--output", "--repair")


@dataclass(frozen=True)
class Outcome:
    """What became of one command or block."""

    page: str
    line: int
    text: str
    said: str
    """`ran`, `refused by CODE` as the page says, `not run: why`, or what went wrong."""
    right: bool = True
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}\n    {self.said} ({self.seconds:.1f} s)"


def run_page(page: str, place: Path, *, slow: bool = False) -> Iterator[Outcome]:
    """Everything of `page`, once; what takes long only if `slow`."""
    seen: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="shoal-page-") as own, stand_ins(place, Path(own)):
        for command in commands(page):
            if command.text not in seen:
                yield _timed(run_command, command, slow)
            seen.add(command.text)
        for block in python_blocks(page):
            yield _timed(run_block, block, slow)


def _timed(run: Callable[..., Outcome], *what: Any) -> Outcome:
    start = time.perf_counter()
    return replace(run(*what), seconds=time.perf_counter() - start)


def run_command(command: Command, slow: bool) -> Outcome:
    """One command through the command line, as it is typed in a shell."""
    if command.text.startswith("curl"):
        return _outcome(command, "asked of the server that the command before it starts")
    if (reason := why_not(command.text)) is not None:
        return _outcome(command, f"not run: {reason}")
    if command.text in SLOW and not slow:
        return _outcome(command, f"not run without -m slow: {SLOW[command.text]}")
    try:
        words = [WORDS.get(word, word) for word in Command(command.page, command.line, whole(command.text)).words]
    except ValueError as error:
        return _outcome(command, str(error), right=False)
    if words[1:2] and words[1] in NAMES and len(words) == 2 and words[1] != "ls":
        words.append("--help")  # the name of a verb within a sentence
    _clear(words)
    result = CliRunner().invoke(app, words[1:], prog_name="shoal")
    refused = REFUSED.get(command.text)
    if refused is not None and result.exit_code == 1 and f"shoal: {refused}: " in result.stderr:
        return _outcome(command, f"refused by {refused}, as the page says")
    if result.exit_code or refused is not None:
        trouble = result.exception if result.exception is not None else ""
        said = f"exit code {result.exit_code}: {result.stderr.strip()[-400:]} {trouble!r}"
        return _outcome(command, said, right=False)
    return _outcome(command, "ran")


def whole(text: str) -> str:
    """A command that leaves something away with what it means."""
    return COMPLETE.get(text, text)


def run_block(block: Block, slow: bool) -> Outcome:
    """A block of Python, with the names that the text around it speaks of."""
    reason = next((why for start, why in BLOCKS.items() if block.text.startswith(start)), "")
    if reason and not (slow and reason.endswith("-m slow")):
        return Outcome(block.page, block.line, _first(block), f"not run: {reason}")
    source = block.text
    for old, new in PUT.items():
        source = source.replace(old, new)
    _clear(["--output", "out"])
    try:
        exec(compile(source, f"{block.page}:{block.line}", "exec"), _names())  # noqa: S102 - our own pages
    except Exception as error:  # whatever the page does wrong is its fault
        return Outcome(block.page, block.line, _first(block), f"{type(error).__name__}: {error}", right=False)
    return Outcome(block.page, block.line, _first(block), "ran")


def _names() -> dict[str, Any]:
    import shoal

    loaded = shoal.load("smollm2", device="cpu")
    inputs = loaded.tokenizer("the cat sat on the mat", return_tensors="pt", return_token_type_ids=False)
    ids = inputs["input_ids"]
    return {
        "shoal": shoal, "model": loaded.model, "inputs": inputs, "prompt": ids, "input_ids": ids, "streamer": None,
    }  # fmt: skip


def _first(block: Block) -> str:
    return f"```python {block.text.strip().splitlines()[0]} ..."


def _outcome(command: Command, said: str, *, right: bool = True) -> Outcome:
    return Outcome(command.page, command.line, command.text, said, right)


def _clear(words: list[str]) -> None:
    """Every command writes to a place of its own: what an earlier one of the page left there goes."""
    for option, value in pairwise(words):
        path = Path(value)
        if option in PLACES and os.path.lexists(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def main() -> int:
    """Print what becomes of every command; the exit code is that of the worst."""
    from .place import build
    from .texts import pages

    wrong, wanted = 0, [word for word in sys.argv[1:] if not word.startswith("-")]
    with tempfile.TemporaryDirectory(prefix="shoal-documented-") as place:
        made = build(Path(place))
        for page in wanted or pages():
            for outcome in run_page(page, made, slow="--quick" not in sys.argv):
                wrong += not outcome.right
                print(outcome, flush=True)  # noqa: T201 - a program
    return 1 if wrong else 0
