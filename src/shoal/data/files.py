"""Text out of files, a piece at a time, so that a large file is read only as far as it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shoal.data.chat import Chat
from shoal.data.document import Document, Opened
from shoal.data.documents import read_documents
from shoal.data.opening import PIECE, opened, require_text
from shoal.data.rows import rows_of
from shoal.data.spelled import is_there
from shoal.errors import DataError

_UNREAD = {".zip", ".7z", ".rar", ".tar", ".tgz", ".arrow", ".feather", ".xlsx", ".xls", ".pkl", ".pt"}


def read_file(path: Path, key: str | None, chat: Chat) -> Opened:
    """The text of a file, recorded by its name without the folders.

    Rows of .jsonl, .json, .csv, .tsv and .parquet are documents (`read_documents`); any other file is UTF-8 text. Of
    all but .parquet a packed file (.gz, .bz2, .xz, .zst) is read too.
    Raises `DataError`: D401 missing, D403 a folder, D404 not text, D407 bad JSON, D408 no such key, D409 a package that
    is not installed, D410 a file type that is not read, D489 a bad table, D491 a damaged archive, and what
    `read_documents` raises.
    """
    if not is_there(path):
        hint = "; of several each needs a weight, as a.jsonl=0.7,b.txt=0.3" if "," in str(path) else ""
        raise DataError(
            f"there is no data file {path}; give a file, 'builtin' or a hub id owner/name{hint}", code="D401"
        )
    if path.is_dir():
        raise DataError(f"{path} is a folder; name one text, jsonl or parquet file in it", code="D403")
    if path.suffix.lower() in _UNREAD:
        raise DataError(f"{path.name}: {path.suffix} is not read; convert it to .txt, .jsonl or .parquet", code="D410")
    rows = rows_of(path, key)
    return Opened(path.name, _text(path)) if rows is None else read_documents(path.name, rows, key, chat)


def _text(path: Path) -> Iterator[Document]:
    with opened(path) as file:
        while piece := file.read(PIECE):
            require_text(piece, path.name)
            yield Document(piece)
