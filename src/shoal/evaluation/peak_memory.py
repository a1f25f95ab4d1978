"""Measures the most memory that a piece of work held beyond what was held before it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


@dataclass
class PeakMemory:
    """What a body of `peak_memory` needed; known when the body has ended."""

    growth: int | None = None
    """Bytes; None where the system does not say (not Linux, and no GPU)."""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure the body: of a GPU what torch allocated, of the CPU the resident set of the process.

    The kernel keeps one high-water mark for a process, which is reset here, so bodies must not be nested.
    """
    found = PeakMemory()
    before = _start(device)
    try:
        yield found
    finally:
        after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
        if before is not None and after is not None:
            found.growth = max(0, after - before)


def _start(device: torch.device) -> int | None:
    if device.type != "cuda":
        return _reset()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _reset() -> int | None:
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int | None:
    try:
        text = (_PROCESS / "status").read_text()
    except OSError:
        return None
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else None
