"""Files opened as text, packed ones too, with each line looked at: what is no text is told by its line."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from shoal.errors import DataError

PIECE = 1 << 16
_UNDECODED = re.compile("[\udc80-\udcff]")
"""What `errors="surrogateescape"` makes of bytes that are no UTF-8."""
_UNPACK: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


@contextmanager
def opened(path: Path) -> Iterator[IO[str]]:
    """The text of a file, unpacked where its name ends in .gz, .bz2, .xz or .zst.

    Raises `DataError` D401 for a file that cannot be read, D409 for .zst without a library, D491 for a damaged archive.
    """
    try:
        with _raw(path) as file:
            yield file
    except _DAMAGED as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is None:  # bz2 says "Invalid data stream" without a number
            raise _damaged(path, error) from None
        raise DataError(f"cannot read {path} ({error.strerror}); name a readable file", code="D401") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # of a library that may not be there to be named
            raise
        raise _damaged(path, error) from None


def lines_of(file: IO[str], path: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line. Raises D404 for one that is not UTF-8 or holds NUL."""
    for number, line in enumerate(file, 1):
        require_text(line, f"{path.name}, line {number}")
        yield number, line


def require_text(piece: str, where: str) -> None:
    """Raise D404 for bytes that no text in UTF-8 has."""
    if not piece.isascii() and _UNDECODED.search(piece):
        raise DataError(f"{where} is not UTF-8 text; convert it, or name another file", code="D404")
    if "\0" in piece:
        raise DataError(f"{where} holds binary data (NUL bytes), not text; name a text file", code="D404")


def _raw(path: Path) -> IO[str]:
    options: dict[str, Any] = {"mode": "rt", "encoding": "utf-8-sig", "errors": "surrogateescape"}
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return _zstandard(path, options)
    made: IO[str] = _UNPACK.get(suffix, open)(path, **options)
    return made


def _zstandard(path: Path, options: dict[str, Any]) -> IO[str]:
    for name in ("compression.zstd", "zstandard"):  # Python's own from 3.14 on
        try:
            library = import_module(name)
        except ImportError:
            continue
        made: IO[str] = library.open(path, **options)
        return made
    raise DataError(f"reading {path.name} needs zstandard: pip install zstandard, or unpack the file", code="D409")


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path.name} is a damaged archive ({error}); copy it again, or unpack it", code="D491")
