"""Tensors that take the place of a layer's own for one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def lent(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Meanwhile the parameters and buffers of `layer` that `tensors` names are these.

    What `torch.func.functional_call` does, in less time, since it looks for no parameter with several names; where
    there is one, that one serves.
    """
    own: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor | None]] = []
    try:
        for name, tensor in tensors.items():
            place, _, leaf = name.rpartition(".")
            module = layer.get_submodule(place)
            held: dict[str, torch.Tensor | None] = (
                module._parameters if leaf in module._parameters else module._buffers  # type: ignore[assignment]
            )
            own.append((held, leaf, held[leaf]))
            held[leaf] = tensor
        yield
    finally:
        for held, leaf, before in reversed(own):
            held[leaf] = before


def has_ties(layer: nn.Module) -> bool:
    """Whether one parameter of the layer has several names."""
    names = [id(p) for _, p in layer.named_parameters(remove_duplicate=False)]
    return len(names) != len(set(names))
