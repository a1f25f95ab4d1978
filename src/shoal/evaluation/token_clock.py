"""The time of each decoded token, as `generate` hands it over."""

from __future__ import annotations

import time

import torch

from shoal.executing.timing import synchronized_time


class TokenClock:
    """A streamer for one sequence that notes when its tokens came: seconds by the wall clock, and of CPU time of this
    process, all its threads together."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.at: list[tuple[float, float]] = []

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate`: the prompt first, then each token."""
        self.at.append((synchronized_time(self.device), time.process_time()))

    def end(self) -> None:
        """Called by `generate`."""

    @property
    def seconds(self) -> tuple[float, float]:
        """From the first new token, which the prompt's pass wrote, to the last: wall clock, and CPU time."""
        (first, first_cpu), (last, last_cpu) = self.at[1], self.at[-1]
        return last - first, last_cpu - first_cpu
