"""From what the user named to a stream of text and the name under which it is recorded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from shoal.data.builtin import builtin_name, builtin_text
from shoal.data.files import file_pieces, joined, value_of
from shoal.errors import DataError

HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.\[\]%-]+))?")
HUB_SPLITS = {"calibrate": "train", "tune": "validation", "test": "test", "whole": "train"}
FILE_SUFFIXES = {".txt", ".jsonl", ".parquet", ".json", ".md", ".rst", ".text"}


def open_source(source: str | Path | Iterable[str], split: str, text_key: str | None) -> tuple[str, Iterator[str]]:
    """The recorded name of `source`, and its text in pieces whose concatenation is the whole.

    A file is recorded by its name without the folders. A hub data set takes the part after the second colon as its
    split; without one, calibrate, tune and test mean train, validation and test.
    Raises `DataError` (D401-D411) for what is missing, unreadable or not text.
    """
    if isinstance(source, str) and source == "builtin":
        return builtin_name(), iter((builtin_text(split),))
    if isinstance(source, str) and ("\n" in source or len(source) > 1024):
        raise DataError("the data is a text where a name was expected; put the text in a list", code="D406")
    if isinstance(source, str | Path):
        match = HUB_ID.fullmatch(str(source)) if isinstance(source, str) and not Path(source).exists() else None
        if match and Path(source).suffix.lower() not in FILE_SUFFIXES:
            return _hub(match, split, text_key)
        return Path(source).name, file_pieces(Path(source), text_key)
    return "list", joined(_strings(source))


def _strings(source: Iterable[str]) -> Iterator[str]:
    try:
        texts = iter(source)
    except TypeError:
        message = f"data must be a file, a hub id, 'builtin' or a list of texts, not a {type(source).__name__}"
        raise DataError(message, code="D406") from None
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"item {number} of the data is a {type(text).__name__}, not text; give texts", code="D406")
        yield text


def _hub(match: re.Match[str], split: str, text_key: str | None) -> tuple[str, Iterator[str]]:
    name, config, part = match["name"], match["config"] or None, match["split"] or HUB_SPLITS[split]
    try:
        from datasets import load_dataset
    except ImportError:
        message = f"there is no file {name}, and reading it as a hub data set needs: pip install shoal[eval]"
        raise DataError(message, code="D409") from None
    recorded = f"{name}:{config or ''}:{part}"
    try:
        rows = load_dataset(name, config, split=part, streaming=True)
    except Exception as error:  # the package raises a dozen unrelated types for a wrong name, config or split
        reason = str(error).strip().split("\n")[0]
        message = f"cannot open the hub data set {recorded} ({reason}); check owner/name:config:split"
        raise DataError(message, code="D411") from error
    return recorded, joined(value_of(row, text_key, recorded) for row in rows)
