"""A plan's new tensors as parameters of a module, so that they go where the model goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn


class HeldTensors(Mapping[str, torch.Tensor]):
    """The plan's new tensors by the plan's names, as parameters of a module that goes where the model goes."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self.module = nn.Module()
        self._keys = {name: name.replace(".", "%2E") for name in tensors}
        for name, tensor in tensors.items():
            value = tensor.to(dtype) if tensor.is_floating_point() else tensor
            if value.is_floating_point():
                self.module.register_parameter(self._keys[name], nn.Parameter(value))
            else:
                self.module.register_buffer(self._keys[name], value)

    def __getitem__(self, name: str) -> torch.Tensor:
        found: torch.Tensor = getattr(self.module, self._keys[name])
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
