"""Windows held back from a piece of data."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from shoal.data.load import Data
from shoal.errors import DataError


def hold_out(data: Data, *, every: int = 4) -> tuple[Data, Data]:
    """(the rest, every `every`-th window from the last one down). Raises D413 for a single window."""
    if len(data) < 2:
        raise DataError("one calibration sequence cannot be parted; use --limit 2 or more", code="D413")
    held = [i for i in range(len(data)) if (len(data) - 1 - i) % every == 0]
    return _only(data, [i for i in range(len(data)) if i not in held]), _only(data, held)


def _only(data: Data, windows: list[int]) -> Data:
    part = data.only(windows)
    digest = hashlib.sha256(f"{data.info.sha256} {windows}".encode()).hexdigest()
    return replace(part, info=replace(data.info, count=len(windows), tokens=part.ids.numel(), sha256=digest))
