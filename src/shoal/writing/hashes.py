"""The proof of a folder that was written tensor by tensor: the two folders side by side, hash by hash."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
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


def compared(
    folder: Path, items: Sequence[Item], plans: Blueprint, wanted: int, tick: Callable[[int], None]
) -> tuple[tuple[Check, ...], str]:
    """The checks of `folder`, which was written from `items`, and one SHA-256 over all its tensors.

    Everything is read again from the disk's view of the folder: its index, headers and config. `wanted`: parameters by
    the plan's cost. `tick` hears of the bytes of each tensor that was compared.
    """
    try:
        found = stored_tensors(folder)
    except ShoalError as error:
        return (Check("loads", False, str(error)[:500], "no error", "index and headers of the written files"),), ""
    sums = _sums([item for item in items if item.name in found], found, tick)
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
    items: Sequence[Item], found: Mapping[str, Stored], tick: Callable[[int], None]
) -> dict[str, tuple[str, str]]:
    """{tensor: (SHA-256 in the source, or of as many zeros; SHA-256 in the output)}; two threads, as hashing waits for
    no lock."""

    @cache
    def of_source(source: Stored) -> str:
        return digest_of(source)

    def ours(item: Item) -> str:
        return _zeros(item.source.size) if item.zero else of_source(item.source)

    sums = {}
    with ThreadPoolExecutor(2) as threads:
        for item in items:
            one = threads.submit(ours, item)
            other = threads.submit(digest_of, found[item.name])
            sums[item.name] = (one.result(), other.result())
            tick(item.source.size)
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
