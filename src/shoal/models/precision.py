"""Sums in double precision, whatever the device: not every accelerator has float64 (Apple's MPS has none)."""

from __future__ import annotations

import torch

_HAS: dict[str, bool] = {}
"""By type of device: whether it holds float64."""


def float64_device(device: torch.device | None) -> torch.device:
    """`device` when it has float64, else the CPU, which always does; None is the CPU."""
    if device is None:
        return torch.device("cpu")
    if device.type not in _HAS:
        try:
            torch.zeros((), dtype=torch.float64, device=device)
            _HAS[device.type] = True
        except (TypeError, RuntimeError):
            _HAS[device.type] = False
    return device if _HAS[device.type] else torch.device("cpu")


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float64, where it is or, when its device has no such type, on the CPU."""
    return tensor.to(float64_device(tensor.device)).double()
