"""The adapter that tokens go through whom a learned gate does not let into its layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shoal.executing.exit_heads import scaled

DOWN, UP = "down", "up"


def adapter_shapes(gate: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the adapter of `gate`; none for an inner width of 0."""
    return {f"{gate}.{DOWN}": (inner, hidden), f"{gate}.{UP}": (hidden, inner)} if inner else {}


def adapted(gate: str, tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """x + up . silu(down . x / rms(x)), [..., tokens, hidden]; x itself where the gate has no adapter."""
    down, up = tensors.get(f"{gate}.{DOWN}"), tensors.get(f"{gate}.{UP}")
    if down is None or up is None:
        return hidden
    inner = torch.nn.functional.silu(scaled(hidden) @ down.to(hidden.device).float().T)
    return hidden + (inner @ up.to(hidden.device).float().T).to(hidden.dtype)
