"""Tensors that are spread over processes (DTensor of torch.distributed)."""

from __future__ import annotations

import sys
from typing import Any

import torch


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of `tensor` only; its shape is that of the whole, and it has no storage."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # nobody can have made one before it was imported
    return module is not None and isinstance(tensor, module.DTensor)
