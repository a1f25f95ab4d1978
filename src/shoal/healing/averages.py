"""Means over the tokens of a step, known in the next one: what a term that is not linear in the tokens goes by."""

from __future__ import annotations

import torch

from shoal.healing.processes import Processes


class Averages:
    """Means of the step before, over all its micro-batches and processes.

    The gradient of n F(d), d the mean of a value over the n tokens of a step, is F'(d) for each of them. With d of the
    step before it is linear in the tokens, so that 1 x 4 windows and 4 x 1 have the same gradient.
    """

    def __init__(self) -> None:
        self.known: dict[str, list[float]] = {}
        """By name the means of the step before."""
        self._sums: dict[str, tuple[torch.Tensor, float]] = {}

    def of(self, name: str, values: torch.Tensor, start: float) -> torch.Tensor:
        """The means [n] of the step before, `start` before the first; `values` [n, tokens] are this micro-batch's. Of
        a forward without gradients the means are its own."""
        if not torch.is_grad_enabled():
            return values.detach().mean(-1)
        before, count = self._sums.get(name, (torch.zeros(len(values)), 0.0))
        self._sums[name] = before + values.detach().sum(-1).cpu().double(), count + values.shape[-1]
        known = self.known.get(name)
        return torch.full_like(values[:, 0], start) if known is None else values.new_tensor(known)

    def step(self, processes: Processes) -> None:
        """A step is over."""
        for name, (sums, count) in sorted(self._sums.items()):
            total = processes.summed(count)
            self.known[name] = [processes.summed(float(one)) / total for one in sums]
        self._sums = {}
