"""Text out of files, a piece at a time, so that a large file is read only as far as it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from shoal.errors import DataError

PIECE = 1 << 16


def file_pieces(path: Path, text_key: str | None) -> Iterator[str]:
    """The text of a .jsonl or .parquet file (documents joined by blank lines), or of any other file as UTF-8 text.

    Raises `DataError`: D401 missing, D403 a folder, D404 not text, D407 a bad line, D408 no such key, D409 a package
    that is not installed, D410 a file type that is not read.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; name one text, jsonl or parquet file in it", code="D403")
    if not path.exists():
        raise DataError(f"there is no data file {path}; give a file, 'builtin' or a hub id owner/name", code="D401")
    if path.suffix.lower() in {".json", ".csv", ".gz", ".zip", ".zst"}:
        raise DataError(f"{path.name}: {path.suffix} is not read; convert it to .txt, .jsonl or .parquet", code="D410")
    readers: dict[str, Callable[[Path, str | None], Iterator[str]]] = {".jsonl": _jsonl, ".parquet": _parquet}
    return readers.get(path.suffix.lower(), _text)(path, text_key)


def joined(documents: Iterator[str]) -> Iterator[str]:
    """Documents with a blank line between them, the usual protocol for perplexity on WikiText."""
    for number, document in enumerate(documents):
        yield document if number == 0 else "\n\n" + document


def value_of(row: Any, text_key: str | None, where: str) -> str:
    """The text of one row under `text_key` (default `text`). Raises `DataError` D408 naming the keys there are."""
    key = text_key or "text"
    if key not in row:
        found = ", ".join(map(str, row)) or "none"
        raise DataError(f"{where} has no key {key!r}; its keys are: {found}; choose one as text key", code="D408")
    text = row[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} holds a {type(text).__name__}, not text; choose a text key", code="D408")
    return text


def _text(path: Path, text_key: str | None) -> Iterator[str]:
    with _opened(path) as file:
        while piece := _read(file, path, lambda: file.read(PIECE)):
            yield piece


def _jsonl(path: Path, text_key: str | None) -> Iterator[str]:
    return joined(_jsonl_documents(path, text_key))


def _jsonl_documents(path: Path, text_key: str | None) -> Iterator[str]:
    with _opened(path) as file:
        number = 0
        while line := _read(file, path, file.readline):
            number += 1
            if line.strip():
                yield value_of(_object(line, path, number), text_key, f"{path.name}, line {number}")


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{path.name}, line {number} is not JSON; mend or remove that line", code="D407") from None
    if not isinstance(row, dict):
        message = f"{path.name}, line {number} holds a {type(row).__name__}, not an object; mend or remove that line"
        raise DataError(message, code="D407")
    return row


def _opened(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); name a readable file", code="D401") from None


def _read(file: TextIO, path: Path, read: Callable[[], str]) -> str:
    try:
        piece = read()
    except UnicodeDecodeError:
        raise DataError(f"{path.name} is not UTF-8 text; convert it, or name another file", code="D404") from None
    if "\0" in piece:
        raise DataError(f"{path.name} holds binary data (NUL bytes), not text; name a text file", code="D404")
    return piece


def _parquet(path: Path, text_key: str | None) -> Iterator[str]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"reading {path.name} needs pyarrow: pip install shoal[eval]", code="D409") from None
    try:
        table = parquet.ParquetFile(path)
    except (ValueError, OSError):  # pyarrow's own errors are ValueErrors
        raise DataError(f"{path.name} is not a parquet file; name another file", code="D404") from None
    return joined(_column(table, text_key, path.name))


def _column(table: Any, text_key: str | None, where: str) -> Iterator[str]:
    key = text_key or "text"
    with table:
        if key not in table.schema_arrow.names:
            value_of(dict.fromkeys(table.schema_arrow.names), key, where)
        for batch in table.iter_batches(batch_size=256, columns=[key]):
            for row in batch.to_pylist():
                yield value_of(row, key, where)
