"""Hidden states kept for later: in memory up to a budget, beyond it in one unnamed file, beyond that not at all."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

import torch

SHARE = 0.25
"""Of the memory, and of the disk, that is free when a store is made."""
UNKNOWN = 1 << 30
"""Bytes taken for free where the system does not say."""


class StateStore:
    """Tensors by key; the least recently used goes from memory to disk, and from disk away.

    `memory`, `disk`: bytes at most; None for a quarter of what is free. The file is unlinked as soon as it is open, so
    that nothing is left behind even by a kill. `get` answers None for what is gone: it must be computed again.
    """

    def __init__(self, device: torch.device, *, memory: int | None = None, disk: int | None = None) -> None:
        self.memory = int(free_memory(device) * SHARE) if memory is None else memory
        self.disk = int(shutil.disk_usage(tempfile.gettempdir()).free * SHARE) if disk is None else disk
        self.spilled = 0
        """States that were written to disk so far."""
        self._held: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._used = 0
        self._scratch: _Scratch | None = None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held or (self._scratch is not None and key in self._scratch)

    def put(self, key: Hashable, state: torch.Tensor) -> None:
        """Keep a copy of `state`, which its owner may change in place; a key that is known already keeps its state."""
        if key in self:
            return
        self._held[key] = state.detach().clone()
        self._used += _bytes(state)
        while self._used > self.memory and self._held:
            oldest, tensor = self._held.popitem(last=False)
            self._used -= _bytes(tensor)
            self._spill(oldest, tensor)

    def get(self, key: Hashable) -> torch.Tensor | None:
        """A copy of the state, or None."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key].clone()
        return None if self._scratch is None else self._scratch.get(key)

    def forget(self, key: Hashable) -> None:
        """Give the place of one state back."""
        if key in self._held:
            self._used -= _bytes(self._held.pop(key))
        elif self._scratch is not None:
            self._scratch.forget(key)

    def close(self) -> None:
        """Forget everything and give the disk back."""
        self._held.clear()
        self._used = 0
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None

    def _spill(self, key: Hashable, tensor: torch.Tensor) -> None:
        if _bytes(tensor) > self.disk:
            return
        if self._scratch is None:
            self._scratch = _Scratch(self.disk)
        self.spilled += 1
        self._scratch.put(key, tensor)


class _Scratch:
    """Tensors one behind the other in an unlinked temporary file; the place of one that went is used again."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 -- it lives as long as the store
        weakref.finalize(self, self._file.close)
        self._places: OrderedDict[Hashable, tuple[int, torch.Tensor]] = OrderedDict()
        """Offset, and an empty tensor on meta that knows shape and dtype; the device beside it."""
        self._devices: dict[Hashable, torch.device] = {}
        self._free: dict[int, list[int]] = {}
        self._end = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def put(self, key: Hashable, tensor: torch.Tensor) -> None:
        place = self._place(_bytes(tensor))
        if place is None:
            return
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        try:
            self._file.seek(place)
            self._file.write(raw.data)
        except OSError:  # the disk is full: what is not kept is computed again
            self.limit = self._end
            return
        self._places[key] = (place, torch.empty_like(tensor, device="meta"))
        self._devices[key] = tensor.device

    def get(self, key: Hashable) -> torch.Tensor | None:
        if key not in self._places:
            return None
        self._places.move_to_end(key)
        place, like = self._places[key]
        state = torch.empty(like.shape, dtype=like.dtype)
        self._file.seek(place)
        raw = state.flatten().view(torch.uint8).numpy()
        if self._file.readinto(raw.data) != raw.nbytes:
            return None
        return state.to(self._devices[key])

    def forget(self, key: Hashable) -> None:
        if key in self._places:
            place, like = self._places.pop(key)
            del self._devices[key]
            self._free.setdefault(_bytes(like), []).append(place)

    def close(self) -> None:
        self._file.close()

    def _place(self, size: int) -> int | None:
        """Where `size` bytes fit; the oldest of that size makes room when the file may not grow."""
        if not self._free.get(size) and self._end + size > self.limit:
            oldest = next((key for key, (_, like) in self._places.items() if _bytes(like) == size), None)
            if oldest is None:
                return None
            self._free.setdefault(size, []).append(self._places.pop(oldest)[0])
            del self._devices[oldest]
        if self._free.get(size):
            return self._free[size].pop()
        self._end += size
        return self._end - size


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device, or of the machine for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    facts = Path("/proc/meminfo")
    if facts.exists():
        lines = dict(line.split(":", 1) for line in facts.read_text(encoding="ascii").splitlines() if ":" in line)
        if "MemAvailable" in lines:
            return 1024 * int(lines["MemAvailable"].split()[0])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, ValueError, OSError):
        return UNKNOWN


def _bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
