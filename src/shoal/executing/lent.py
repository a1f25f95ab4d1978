"""Tensors that take the place of a layer's own for one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def lent(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Meanwhile the parameters and buffers of `layer` that `tensors` names are these.

    What `torch.func.functional_call` does, in less time, since it looks for no parameter with several names: where
    there is one, `every_name` says what to lend.
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


def every_name(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` under every name that the layer has for the parameter in whose place each stands."""
    ids = {name: id(p) for name, p in layer.named_parameters(remove_duplicate=False)}
    by_id = {ids[name]: tensor for name, tensor in tensors.items() if name in ids}
    return {**tensors, **{name: by_id[one] for name, one in ids.items() if one in by_id}}
