"""The proof of a folder that was written tensor by tensor: the two folders side by side, hash by hash."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

from shoal.errors import ShoalError
from shoal.models.load import load_config, meta_model
from shoal.models.names import attributed
from shoal.models.shards import Stored, stored_tensors
from shoal.models.stacks import find_stack
from shoal.writing.container import Item
from shoal.writing.judge import Check
from shoal.writing.surgery import Blueprint

_BUFFER = 1 << 20
_LAG = 256 << 20
"""Bytes that a copy may be ahead of the hashing of its source: what was copied last is still in memory, so that the
source is read from its disk once."""
THREADS = min(8, os.cpu_count() or 1)
"""Hashing waits for no lock."""


class Sums:
    """SHA-256 of tensors of the source, worked out in other threads while they are copied."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._found: dict[Stored, Future[str]] = {}
        self._waiting: deque[Stored] = deque()
        self._lag = 0

    def add(self, stored: Stored) -> None:
        """Hash this tensor soon; waits while too much is waiting."""
        if stored in self._found:
            return
        self._found[stored] = self._threads.submit(digest_of, stored)
        self._waiting.append(stored)
        self._lag += stored.size
        while self._lag > _LAG:
            first = self._waiting.popleft()
            self._found[first].result()
            self._lag -= first.size

    def of(self, stored: Stored) -> str:
        """The SHA-256 of a tensor, also of one that was never added."""
        return self._found[stored].result() if stored in self._found else digest_of(stored)


def compared(
    folder: Path, items: Sequence[Item], plans: Blueprint, wanted: int, tick: Callable[[int], None], source: Sums
) -> tuple[tuple[Check, ...], str]:
    """The checks of `folder`, which was written from `items`, and one SHA-256 over all its tensors.

    Everything of `folder` is read again: its index, headers, config and tensors. `wanted`: parameters by the plan's
    cost. `tick` hears of the bytes of each tensor that was compared. `source`: what is known of the tensors there.
    """
    try:
        found = stored_tensors(folder)
    except ShoalError as error:
        return (Check("loads", False, str(error)[:500], "no error", "index and headers of the written files"),), ""
    sums = _sums([item for item in items if item.name in found], found, tick, source)
    return tuple(_checks(folder, items, plans, wanted, found, sums)), _whole(sums)


def _checks(
    folder: Path,
    items: Sequence[Item],
    plans: Blueprint,
    wanted: int,
    found: Mapping[str, Stored],
    sums: Mapping[str, tuple[str, str]],
) -> Iterator[Check]:
    names = {item.name for item in items}
    stray = sorted(names ^ found.keys())
    yield Check("tensors", not stray, len(stray), 0, _named("tensors missing or too many", stray))
    kinds = [
        i.name
        for i in items
        if i.name in found and (found[i.name].dtype, found[i.name].shape) != (i.source.dtype, i.source.shape)
    ]
    yield Check("dtypes and shapes", not kinds, len(kinds), 0, _named("tensors of another dtype or shape", kinds))
    wrong = [name for name, (ours, theirs) in sums.items() if ours != theirs]
    yield Check("weights", not wrong, len(wrong), 0, _named("tensors whose SHA-256 is not that of the source", wrong))
    try:
        model = meta_model(load_config(folder))
        stack = find_stack(model)
        attributed(model, stack, {name: place.shape for name, place in found.items()})
    except ShoalError as error:
        yield Check(
            "fits",
            False,
            str(error)[:500],
            "no error",
            "names and sizes of the tensors, against the model of the written config",
        )
        return
    count = sum(p.numel() for p in model.parameters())  # a tied one is named once
    yield Check("parameters", count == wanted, count, wanted, "of the written config's model, against the plan's cost")
    slots = len(plans.slots)
    yield Check("depth", stack.depth == slots, stack.depth, slots, "num_hidden_layers, against the layers of the plan")


def _named(what: str, names: Sequence[str]) -> str:
    return f"{what}: {', '.join(names[:3])}" if names else what


def _sums(
    items: Sequence[Item], found: Mapping[str, Stored], tick: Callable[[int], None], source: Sums
) -> dict[str, tuple[str, str]]:
    """{tensor: (SHA-256 in the source, or of as many zeros; SHA-256 in the output)}."""
    sums = {}
    with ThreadPoolExecutor(THREADS) as threads:
        try:
            theirs = {item.name: threads.submit(digest_of, found[item.name]) for item in items}
            for item in items:
                ours = _zeros(item.source.size) if item.zero else source.of(item.source)
                sums[item.name] = (ours, theirs[item.name].result())
                tick(item.source.size)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return sums


def digest_of(stored: Stored) -> str:
    """SHA-256 of one tensor's bytes, read through a buffer of 1 MiB."""
    total, left = hashlib.sha256(), stored.size
    view = memoryview(bytearray(min(_BUFFER, max(left, 1))))
    with stored.file.open("rb", buffering=0) as stream:
        stream.seek(stored.start)
        while left:
            got = stream.readinto(view[: min(left, len(view))])
            if not got:
                break
            total.update(view[:got])
            left -= got
    return total.hexdigest()


def _zeros(size: int) -> str:
    total, piece = hashlib.sha256(), bytes(_BUFFER)
    for start in range(0, size, _BUFFER):
        total.update(piece[: min(_BUFFER, size - start)])
    return total.hexdigest()


def _whole(sums: Mapping[str, tuple[str, str]]) -> str:
    lines = "".join(f"{name} {theirs}\n" for name, (_, theirs) in sorted(sums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
