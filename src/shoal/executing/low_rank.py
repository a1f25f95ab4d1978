"""A linear module with low-rank factors beside its matrix, or in its place, for the length of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from shoal.plan.low_rank import BESIDE

Lookup = Callable[[str], torch.Tensor]
"""From the word of a factor to its tensor, in the dtype and on the device of the module's matrix."""


class LowRank(nn.Module):
    """Stands for a linear module: y + up(down x), or left(right x) + bias."""

    def __init__(self, child: nn.Module, words: tuple[str, ...], lookup: Lookup) -> None:
        super().__init__()
        self.__dict__.update(_child=child, _words=words, _lookup=lookup)  # parameters must not appear twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_child"], name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x` [..., in] to [..., out]."""
        child, (wide, narrow), lookup = self.__dict__["_child"], self.__dict__["_words"], self.__dict__["_lookup"]
        change = nn.functional.linear(nn.functional.linear(x, lookup(narrow)), lookup(wide))
        if (wide, narrow) == BESIDE:
            made: torch.Tensor = child(x, *args, **kwargs)
            return made + change
        bias = getattr(child, "bias", None)
        return change if bias is None else change + bias


def folded(weight: torch.Tensor, factors: Mapping[str, torch.Tensor], *, transposed: bool) -> torch.Tensor:
    """One matrix, computed in float32 and in the dtype of `weight`: W + up down, or left right. `transposed`: W is
    [in, out]."""
    first, second = (factors[word] for word in (BESIDE if BESIDE[0] in factors else ("left", "right")))
    change = first.detach().to(weight.device).float() @ second.detach().to(weight.device).float()
    change = change.T if transposed else change
    return (weight.detach().float() + change if BESIDE[0] in factors else change).to(weight.dtype).contiguous()
