"""Rows with keys out of files, one at a time where the format allows it, each with the place it came from."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from shoal.data.opening import lines_of, opened
from shoal.data.spelled import PACKED, suffix_of
from shoal.errors import DataError

Row = tuple[str, Mapping[str, Any]]
"""Where it stands (`a.jsonl, line 3`), and its values by key."""
LISTS = ("data", "train", "rows", "examples", "conversations")
"""Keys under which a JSON object holds its list of rows; the first that is there counts."""
_CELL = 1 << 30
"""Characters of a cell; Python's own limit is 131,072, and documents are longer."""


def rows_of(path: Path, key: str | None) -> Iterator[Row] | None:
    """The rows of a .jsonl, .json, .csv, .tsv or .parquet file; None for a file of any other name. `key`: the one that
    will be read, if it is known.

    Raises `DataError` as they are read: D404 no text, D407 bad JSON, D409 a package that is not installed, D489 a bad
    table.
    """
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _table, ".tsv": _table,
        ".parquet": partial(_parquet, key=key),
    }  # fmt: skip
    reader = readers.get(suffix_of(path))
    return None if reader is None else reader(path)


def _jsonl(path: Path) -> Iterator[Row]:
    with opened(path) as file:
        yield from _json_lines(lines_of(file, path), path)


def _json_lines(lines: Iterator[tuple[int, str]], path: Path) -> Iterator[Row]:
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{where} is not JSON; mend or remove that line", code="D407") from None
        yield where, _object(row, where, "mend or remove that line")


def _object(row: Any, where: str, remedy: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}, not an object; {remedy}", code="D407")
    return row


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, an object with such a list, or JSON lines, which many tools name .json too."""
    with opened(path) as file:
        lines = list(lines_of(file, path))
    try:
        found = json.loads("".join(line for _, line in lines))
    except RecursionError:
        raise DataError(f"{path.name} nests too deep for JSON; mend it", code="D407") from None
    except ValueError as error:
        if _is_object(next((line for _, line in lines if line.strip()), "")):
            yield from _json_lines(iter(lines), path)
            return
        place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path.name}{place} is not JSON; mend it, or name another file", code="D407") from None
    for number, row in enumerate(_list(found, path.name), 1):
        where = f"{path.name}, item {number}"
        yield where, _object(row, where, "mend or remove that item")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _list(found: Any, name: str) -> list[Any]:
    """The rows of a parsed file; a single row is a list of one."""
    if isinstance(found, list):
        return found
    found = _object(found, name, "give a list of objects")
    key = next((key for key in LISTS if _holds_rows(found.get(key))), None)
    if key is not None:
        return list(found[key])
    others = [key for key, value in found.items() if _holds_rows(value) and key != "messages"]
    if others:
        raise DataError(
            f"{name} has its rows under {others[0]!r}; call that key 'data' or 'train', or keep the list alone",
            code="D407",
        )
    return [found]


def _holds_rows(value: Any) -> bool:
    """Whether this is a list of rows, and not one conversation of turns."""
    turn = {"role", "from", "content", "value"}
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and not turn & set(value[0])


def _table(path: Path) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), _CELL))
    with opened(path) as file:
        lines = (line for _, line in lines_of(file, path))
        head = next(lines, "")
        reader = csv.reader(chain([head], lines), delimiter=_delimiter(head, path), strict=True)
        try:
            yield from _cells(reader, path)
        except csv.Error as error:
            raise DataError(
                f"{path.name}, line {reader.line_num} is no row of a table ({error}); mend that line", code="D489"
            ) from None


def _delimiter(head: str, path: Path) -> str:
    """A tab for .tsv; for .csv a comma, or what else parts the names of the first line where no comma does."""
    if suffix_of(path) == ".tsv":
        return "\t"
    return next((mark for mark in ";\t|" if mark in head and "," not in head), ",")


def _cells(reader: Any, path: Path) -> Iterator[Row]:
    names: list[str] = next((row for row in reader if row), [])
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path.name} has two columns {twice!r}; rename one of them", code="D489")
    for cells in reader:
        if not cells:
            continue
        where = f"{path.name}, line {reader.line_num}"
        if len(cells) != len(names):
            raise DataError(
                f"{where} has {len(cells)} columns, the first line has {len(names)} ({', '.join(names)}); mend that "
                "line, or put its text in double quotes",
                code="D489",
            )
        yield where, dict(zip(names, cells, strict=True))


def _parquet(path: Path, key: str | None) -> Iterator[Row]:
    if path.suffix.lower() in PACKED:
        raise DataError(f"{path.name}: a packed .parquet is not read; unpack it", code="D410")
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"reading {path.name} needs pyarrow: pip install shoal[eval]", code="D409") from None
    number = 0
    try:
        with closing(parquet.ParquetFile(path)) as table:
            names = table.schema_arrow.names
            only = next(([name] for name in (key, "text") if name in names), None) if key in (None, *names) else None
            for batch in table.iter_batches(batch_size=256, columns=only):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path.name}, row {number}", row
    except (ValueError, OSError):  # pyarrow's own errors are ValueErrors
        at = f" behind row {number}" if number else ""
        raise DataError(f"{path.name} is not a parquet file{at}; name another file", code="D404") from None
