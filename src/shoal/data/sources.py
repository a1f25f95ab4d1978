"""From what the user named to a stream of text and the name under which it is recorded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from shoal.data.builtin import builtin_name, builtin_text
from shoal.data.chat import Chat
from shoal.data.document import Document, Opened, joined
from shoal.data.documents import read_documents
from shoal.data.files import read_file
from shoal.data.rows import Row
from shoal.data.spelled import BUILTIN, HUB_ID, Part
from shoal.errors import DataError, first_line

HUB_SPLITS = {"calibrate": "train", "tune": "validation", "test": "test", "whole": "train"}


def open_source(source: Part | Path | Iterable[str], split: str, key: str | None, chat: Chat) -> Opened:
    """The text of one source. `key`: of its rows, where a part names none.

    A hub data set takes the part after the second colon as its split; without one, calibrate, tune and test mean
    train, validation and test. Raises `DataError` for what is missing, unreadable or not text.
    """
    if isinstance(source, Path):
        return read_file(source, key, chat)
    if not isinstance(source, Part):
        return Opened("list", joined(Document(text) for text in _strings(source)))
    if source.name == BUILTIN:
        return Opened(builtin_name(), iter((Document(builtin_text(split)),)))
    if (path := source.file) is None:
        match = HUB_ID.fullmatch(source.name)
        assert match is not None
        return _hub(match, split, key, chat)
    if source.key is not None and path.is_file() and not source.has_rows:
        raise DataError(f"{path.name} is plain text without keys; leave ':{source.key}' off", code="D408")
    return read_file(path, source.key or key, chat)


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


def _hub(match: re.Match[str], split: str, key: str | None, chat: Chat) -> Opened:
    name, config, part = match["name"], match["config"] or None, match["split"] or HUB_SPLITS[split]
    try:
        from datasets import load_dataset
    except ImportError:
        message = f"there is no file {name}, and reading it as a hub data set needs: pip install shoal[eval]"
        raise DataError(message, code="D409") from None
    recorded = f"{name}:{config or ''}:{part}"
    rows = _hub_rows(lambda: load_dataset(name, config, split=part, streaming=True), recorded)
    return read_documents(recorded, rows, key, chat)


def _hub_rows(load: Callable[[], Iterable[Any]], recorded: str) -> Iterator[Row]:
    try:
        for number, row in enumerate(load(), 1):
            yield f"{recorded}, row {number}", row
    except Exception as error:  # the package raises a dozen unrelated types for a wrong name, config or split
        reason = first_line(error)
        message = f"cannot open the hub data set {recorded} ({reason}); check owner/name:config:split"
        raise DataError(message, code="D411") from error
