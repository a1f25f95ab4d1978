"""The safetensors container, written from headers that are known in advance: no tensor is ever in memory."""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import FileIO
from itertools import accumulate, zip_longest
from pathlib import Path

from shoal.errors import ModelError, UsageError
from shoal.models.checkpoint import INDEX
from shoal.models.shards import SINGLE, Stored

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_PIECE = 64 << 20
"""Bytes handed to the system at once, so that Ctrl-C is not kept waiting."""
_BUFFER = 4 << 20
_ELSEWHERE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY)
"""What a system answers that cannot copy from this file system to that one by itself."""

_SETTLE = 256 << 20
"""Bytes after which a growing file may be brought to the disk, so that the disk need not wait for its end."""

THREADS = min(8, os.cpu_count() or 1)
"""Copying and comparing wait for no lock."""

Tick = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor to write."""

    name: str
    source: Stored
    zero: bool = False
    """Write zeros of the same dtype and shape in its place."""


Pair = tuple[Item, Stored]
"""A tensor, and the place it is written to."""
Copied = Callable[[Item, Stored], None]


def parse_size(text: str) -> int:
    """Bytes of "5GB" (10^9), "512MiB" (2^20), "20KB". Raises U524."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", text.upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise UsageError(f"{text!r} is no size of a file; write it as 5GB or 500MB", code="U524")
    return size


def write_shards(
    folder: Path,
    items: Sequence[Item],
    limit: int,
    tick: Tick,
    *,
    copied: Copied = lambda *_: None,
    settle: Callable[[Path], None] = lambda _: None,
) -> list[Path]:
    """Write `items` in their order to files of `limit` bytes of tensors at most (a larger tensor has a file of its own)
    and the index of them when they are several. Returns the files.

    Several threads copy, one tensor each: a disk of today is not kept busy by one. `copied` hears, in such a thread, of
    each tensor with the place where it now is; here `tick` hears of its bytes, and `settle` of a file after every
    256 MiB and when it is complete.

    Raises `OSError`, and `ModelError` M309 when a source file is shorter than its header says.
    """
    shards = _shards(items, limit)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    places = [_begin(folder / name, shard) for name, shard in zip(names, shards, strict=True)]
    # by turns from each file: two threads that write to one file wait for each other
    _fill_all([pair for turn in zip_longest(*places) for pair in turn if pair is not None], tick, copied, settle)
    if count > 1:
        total = sum(item.source.size for item in items)
        weight_map = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8", newline="\n")
    return [folder / name for name in names]


def _fill_all(pairs: Sequence[Pair], tick: Tick, copied: Copied, settle: Callable[[Path], None]) -> None:
    stop, waiting = threading.Event(), Counter[Path]()
    left = Counter(place.file for _, place in pairs)
    with ThreadPoolExecutor(THREADS) as threads:
        try:
            for (_, place), future in [(pair, threads.submit(_fill, *pair, stop, copied)) for pair in pairs]:
                future.result()
                tick(place.size)
                left[place.file] -= 1
                waiting[place.file] += place.size
                if not left[place.file] or waiting[place.file] >= _SETTLE:
                    settle(place.file)
                    waiting[place.file] = 0
        except BaseException:
            stop.set()
            threads.shutdown(cancel_futures=True)
            raise


def _shards(items: Iterable[Item], limit: int) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    held = 0
    for item in items:
        if shards[-1] and held + item.source.size > limit:
            shards.append([])
            held = 0
        shards[-1].append(item)
        held += item.source.size
    # wide numbers first, as safetensors itself does, so that each tensor begins at a multiple of its item's size
    return [sorted(shard, key=lambda item: -_width(item.source)) for shard in shards]


def _width(stored: Stored) -> int:
    digits = re.search(r"\d+", stored.dtype)
    return int(digits[0]) if digits else 8


def _begin(file: Path, items: Sequence[Item]) -> list[Pair]:
    """A file with its header and its whole length, which is a hole until it is filled; where each tensor goes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for item in items:
        source = item.source
        header[item.name] = {
            "dtype": source.dtype,
            "shape": list(source.shape),
            "data_offsets": [end, end + source.size],
        }
        end += source.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as target:
        target.write(struct.pack("<Q", len(text)) + text)
        target.truncate(8 + len(text) + end)
    starts = accumulate((item.source.size for item in items), initial=8 + len(text))
    return [(item, replace(item.source, file=file, start=start)) for item, start in zip(items, starts, strict=False)]


def _fill(item: Item, place: Stored, stop: threading.Event, copied: Copied) -> None:
    if not item.zero:  # zeros are what a hole is read as
        with item.source.file.open("rb", buffering=0) as source, place.file.open("r+b", buffering=0) as target:
            copy_bytes(source, item.source.start, target, place.start, place.size, stop)
    if not stop.is_set():
        copied(item, place)


def copy_bytes(source: FileIO, start: int, target: FileIO, offset: int, size: int, stop: threading.Event) -> None:
    """Copy `size` bytes inside the system where it can, else by a buffer of 4 MiB, until `stop`. Raises M309 for a
    short source."""
    inside = hasattr(os, "copy_file_range")
    while size and not stop.is_set():
        moved = 0
        if inside:
            try:
                moved = os.copy_file_range(source.fileno(), target.fileno(), min(size, _PIECE), start, offset)
            except OSError as error:
                inside = False
                if error.errno not in _ELSEWHERE:
                    raise
        if not moved:  # also where a file system answers 0 instead of an error
            inside = False
            moved = _by_buffer(source, start, target, offset, min(size, _BUFFER))
        start, offset, size = start + moved, offset + moved, size - moved


def _by_buffer(source: FileIO, start: int, target: FileIO, offset: int, size: int) -> int:
    source.seek(start)
    piece = source.read(size)
    if not piece:
        raise ModelError(f"{source.name} ends before its header says; copy it again", code="M309")
    target.seek(offset)
    view = memoryview(piece)
    while view:
        view = view[target.write(view) :]
    return len(piece)
