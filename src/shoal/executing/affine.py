"""A linear module whose answer is scaled and shifted, for the length of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shoal.executing.linear_stand_in import LinearStandIn


class Affine(LinearStandIn):
    """Stands for a linear module: y * scale + shift."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x` [..., in] to [..., out]."""
        made: torch.Tensor = self.child(x, *args, **kwargs)
        made = made * self.lookup("scale") if "scale" in self.words else made
        return made + self.lookup("shift") if "shift" in self.words else made


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
