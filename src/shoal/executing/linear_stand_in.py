"""What stands for a linear module for the length of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Lookup = Callable[[str], torch.Tensor]
"""From the last word of a tensor's name to the tensor, in the dtype and on the device of the module's matrix."""


class LinearStandIn(nn.Module):
    """Has the attributes of a linear module, whose parameters do not appear twice: `child` is not registered."""

    def __init__(self, child: nn.Module, words: tuple[str, ...], lookup: Lookup) -> None:
        super().__init__()
        self.__dict__.update(child=child, words=words, lookup=lookup)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["child"], name)
