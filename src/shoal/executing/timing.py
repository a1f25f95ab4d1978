"""Reading the clock."""

from __future__ import annotations

import time

import torch


def synchronized_time(device: torch.device) -> float:
    """Seconds by the wall clock, read once all work queued on `device` is done: an accelerator's kernels run on while
    Python goes ahead."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return time.perf_counter()
