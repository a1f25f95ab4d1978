"""A linear module with low-rank factors beside its matrix, or in its place, for the length of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shoal.executing.linear_stand_in import LinearStandIn
from shoal.plan.low_rank import BESIDE


class LowRank(LinearStandIn):
    """Stands for a linear module: y + up(down x), or left(right x) + bias."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x` [..., in] to [..., out]."""
        (wide, narrow), lookup = self.words, self.lookup
        change = nn.functional.linear(nn.functional.linear(x, lookup(narrow)), lookup(wide))
        if (wide, narrow) == BESIDE:
            made: torch.Tensor = self.child(x, *args, **kwargs)
            return made + change
        bias = getattr(self.child, "bias", None)
        return change if bias is None else change + bias


def folded(weight: torch.Tensor, factors: Mapping[str, torch.Tensor], *, transposed: bool) -> torch.Tensor:
    """One matrix, computed in float32 and in the dtype of `weight`: W + up down, or left right. `transposed`: W is
    [in, out]."""
    first, second = (factors[word] for word in (BESIDE if BESIDE[0] in factors else ("left", "right")))
    change = first.detach().to(weight.device).float() @ second.detach().to(weight.device).float()
    change = change.T if transposed else change
    return (weight.detach().float() + change if BESIDE[0] in factors else change).to(weight.dtype).contiguous()
