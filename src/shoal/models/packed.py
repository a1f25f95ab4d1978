"""Weights that a quantiser keeps in a code of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from shoal.models.spread import is_spread


def is_subclass(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a class that packs others into one (torchao): it says that it holds fractions, and most
    operations on it are not there."""
    return hasattr(tensor, "__tensor_flatten__") and not is_spread(tensor)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a weight is here to be read and computed with: neither packed nor offloaded."""
    return tensor.is_floating_point() and not tensor.is_meta and not is_subclass(tensor)


def unpacked(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensors with a storage that one holds: itself, or what it packs."""
    if not is_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from unpacked(getattr(tensor, name))
