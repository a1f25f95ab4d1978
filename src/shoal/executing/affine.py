"""A linear module whose answer is scaled and shifted, for the length of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shoal.executing.low_rank import Lookup


class Affine(nn.Module):
    """Stands for a linear module: y * scale + shift."""

    def __init__(self, child: nn.Module, words: tuple[str, ...], lookup: Lookup) -> None:
        super().__init__()
        self.__dict__.update(_child=child, _words=words, _lookup=lookup)  # parameters must not appear twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_child"], name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x` [..., in] to [..., out]."""
        words, lookup = self.__dict__["_words"], self.__dict__["_lookup"]
        made: torch.Tensor = self.__dict__["_child"](x, *args, **kwargs)
        made = made * lookup("scale") if "scale" in words else made
        return made + lookup("shift") if "shift" in words else made


def folded_affine(
    weight: torch.Tensor, bias: torch.Tensor | None, own: Mapping[str, torch.Tensor], *, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The matrix and the bias of a module that does the same: computed in float32, in the dtype of `weight`.
    `transposed`: the matrix is [in, out]. A shift needs a bias."""
    scale = own.get("scale", weight.new_ones(1)).detach().to(weight.device).float()
    rows = scale if transposed or scale.numel() == 1 else scale[:, None]
    matrix = (weight.detach().float() * rows).to(weight.dtype).contiguous()
    if bias is None:
        return matrix, None
    shift = own.get("shift", bias.new_zeros(1)).detach().to(weight.device).float()
    return matrix, (bias.detach().float() * scale + shift).to(bias.dtype).contiguous()
