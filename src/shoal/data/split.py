"""Windows held back from a piece of data."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch

from shoal.data.load import Data
from shoal.errors import DataError


def hold_out(data: Data, *, every: int = 4) -> tuple[Data, Data]:
    """(the rest, every `every`-th window from the last one down). Raises D413 for a single window."""
    if len(data) < 2:
        raise DataError("one calibration sequence cannot be parted; use --limit 2 or more", code="D413")
    held = [i for i in range(len(data)) if (len(data) - 1 - i) % every == 0]
    return _only(data, [i for i in range(len(data)) if i not in held]), _only(data, held)


def _only(data: Data, windows: list[int]) -> Data:
    rows = torch.tensor(windows)
    ids = data.ids[rows]
    digest = hashlib.sha256(f"{data.info.sha256} {windows}".encode()).hexdigest()
    info = replace(data.info, count=len(windows), tokens=ids.numel(), sha256=digest)
    return Data(ids, None if data.mask is None else data.mask[rows], info)
