"""Least squares from sums alone: whatever the number of tokens, [inputs, inputs] and [inputs, outputs] are held."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.errors import UsageError
from shoal.models.precision import float64_device, in_float64

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Shares of the mean squared input that are tried as regularisation."""


@dataclass
class Normal:
    """Sums over tokens of inputs x [n, p] and targets y [n, q], in float64, centred when the map has a bias."""

    inputs: int
    outputs: int
    device: torch.device | None = None
    """Where the sums are held; the CPU where this device has no float64."""

    def __post_init__(self) -> None:
        self.count = 0
        self.device = float64_device(self.device)
        self.xx = self._zeros(self.inputs, self.inputs)
        self.xy = self._zeros(self.inputs, self.outputs)
        self.x, self.y, self.yy = self._zeros(self.inputs), self._zeros(self.outputs), self._zeros()

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.device)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Count the tokens x [n, p] with the targets y [n, q]."""
        x, y = (in_float64(one).to(self.xx.device) for one in (x, y))
        self.count += len(x)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.yy += y.square().sum()

    def centred(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Covariance [p, p] and cross-covariance [p, q], each times the number of tokens."""
        return self.xx - torch.outer(self.x, self.x) / self.count, self.xy - torch.outer(self.x, self.y) / self.count

    def solve(
        self, ridge: float, *, bias: bool = True, towards: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W [q, p] and b [q] (None without bias) that make |W x + b - y|^2 + ridge * mean(x^2) * n * |W - towards|^2
        smallest; `towards` [q, p] is 0 when not given."""
        self._require(1)
        xx, xy = self.centred() if bias else (self.xx.clone(), self.xy.clone())
        weight = xx.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny) * ridge
        if towards is not None:
            xy = xy + weight * towards.to(xy.device, torch.float64).T
        xx = xx + weight * torch.eye(self.inputs, dtype=xx.dtype, device=xx.device)
        found = torch.linalg.solve(xx, xy).T
        return found, (self.y - found @ self.x) / self.count if bias else None

    def error(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float:
        """Mean squared error per output element of W [q, p] and b [q] on these tokens."""
        w = weight.to(self.xx.device, torch.float64)
        total = self.yy - 2 * (w * self.xy.T).sum() + ((w @ self.xx) * w).sum()
        if bias is not None:
            b = bias.to(self.xx.device, torch.float64)
            total = total + self.count * b.square().sum() + 2 * (b * (w @ self.x - self.y)).sum()
        return max(0.0, float(total)) / (self.count * self.outputs)

    def _require(self, tokens: int) -> None:
        if self.count < tokens:
            raise UsageError(
                f"no token is left to fit on: {self.count} count; give longer calibration sequences or a smaller "
                "skip_first",
                code="U554",
            )


def best_ridge(
    fitted: Normal, held: Normal | None, *, bias: bool, towards: torch.Tensor | None = None
) -> tuple[float, torch.Tensor, torch.Tensor | None]:
    """The ridge of `RIDGES` with the least error on the tokens `held` back, and its map; 1e-4 when none are."""
    if held is None or not held.count:
        return (1e-4, *fitted.solve(1e-4, bias=bias, towards=towards))
    tried = [(ridge, *fitted.solve(ridge, bias=bias, towards=towards)) for ridge in RIDGES]
    return min(tried, key=lambda one: held.error(one[1], one[2]))
