"""The proof of a folder that was written tensor by tensor: its bytes beside those they were copied from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import numpy as np

from shoal.errors import ShoalError
from shoal.models.load import load_config, structure
from shoal.models.names import attributed
from shoal.models.opened import open_model
from shoal.models.shards import Stored, stored_tensors
from shoal.writing.blueprint import Blueprint
from shoal.writing.checks import Check
from shoal.writing.container import Item
from shoal.writing.references_check import references_check

_BUFFER = 256 << 10
"""Bytes compared at once: two of these stay in a core's own cache, where reading them again costs nothing."""


class CopyCheck:
    """Copies and what they were made from, compared byte by byte as soon as each is made: both are in memory then, and
    no disk is read twice."""

    def __init__(self) -> None:
        self._found: dict[tuple[Stored, Stored | None], bool] = {}

    def add(self, item: Item, copy: Stored) -> None:
        """Compare what was written to the place `copy`; from any thread."""
        source = None if item.zero else item.source
        self._found[copy, source] = same_bytes(copy, source)

    def same(self, item: Item, copy: Stored) -> bool:
        """Whether `copy`, a place that a header names, was compared with the source of `item` and is the same."""
        return self._found.get((copy, None if item.zero else item.source), False)


def copy_checks(
    folder: Path,
    items: Sequence[Item],
    plans: Blueprint,
    wanted: int,
    copies: CopyCheck,
    *,
    trust_remote_code: bool = False,
) -> tuple[Check, ...]:
    """The checks of `folder`, which was written from `items`.

    Its index, headers and config are read again; each tensor must lie, with the source's dtype and shape, just where
    `copies` compared it with its source. `wanted`: parameters by the plan's cost.
    """
    try:
        found = stored_tensors(folder)
    except ShoalError as error:
        return (Check("loads", False, str(error)[:500], "no error", "index and headers of the written files"),)
    return tuple(_checks(folder, items, plans, wanted, found, copies, trust_remote_code))


def _checks(
    folder: Path,
    items: Sequence[Item],
    plans: Blueprint,
    wanted: int,
    found: Mapping[str, Stored],
    copies: CopyCheck,
    trusted: bool,
) -> Iterator[Check]:
    names = {item.name for item in items}
    stray = sorted(names ^ found.keys())
    yield Check("tensors", not stray, len(stray), 0, _named("tensors missing or too many", stray))
    there = [item for item in items if item.name in found]
    kinds = [i.name for i in there if (found[i.name].dtype, found[i.name].shape) != (i.source.dtype, i.source.shape)]
    yield Check("dtypes and shapes", not kinds, len(kinds), 0, _named("tensors of another dtype or shape", kinds))
    wrong = [item.name for item in there if not copies.same(item, found[item.name])]
    yield Check("weights", not wrong, len(wrong), 0, _named("tensors whose bytes are not those of the source", wrong))
    try:
        config = load_config(folder, trust_remote_code=trusted)
        model = structure(config, folder, trust_remote_code=trusted)
        stack = open_model(model).stack()
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
    yield references_check(folder)
    slots = len(plans.slots)
    yield Check("depth", stack.depth == slots, stack.depth, slots, "num_hidden_layers, against the layers of the plan")


def _named(what: str, names: Sequence[str]) -> str:
    return f"{what}: {', '.join(names[:3])}" if names else what


def same_bytes(one: Stored, other: Stored | None) -> bool:
    """Whether two tensors hold the same bytes, or `one` nothing but zeros. Raises `OSError`."""
    if other is not None and one.size != other.size:
        return False
    ours, theirs = np.zeros((2, _BUFFER), dtype=np.uint8)
    with ExitStack() as opened:
        first = opened.enter_context(one.file.open("rb", buffering=0))
        second = opened.enter_context(other.file.open("rb", buffering=0)) if other is not None else None
        first.seek(one.start)
        if second is not None and other is not None:
            second.seek(other.start)
        for start in range(0, one.size, _BUFFER):
            count = min(_BUFFER, one.size - start)
            there = _fill(first, ours.data[:count]) and (second is None or _fill(second, theirs.data[:count]))
            # whole buffers, eight bytes at a time: what is left in them from before is the same in both
            if not there or not np.array_equal(ours.view(np.uint64), theirs.view(np.uint64)):
                return False
    return True


def _fill(stream: FileIO, view: memoryview) -> bool:
    """False where the file ends before `view` is full."""
    while view:
        got = stream.readinto(view)
        if not got:
            return False
        view = view[got:]
    return True
