"""How a process of a Ray cluster comes by the model: read where it was read here, or a copy of the one here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Protocol

import torch

from shoal.errors import UsageError
from shoal.models.load import Loaded, load
from shoal.models.origin import Origin, difference, fingerprints


class ModelSource(Protocol):
    """Where a process takes the model from; it is pickled."""

    def loaded(self) -> Loaded:
        """The model, in the process that asks."""


@dataclass(frozen=True)
class _Read:
    """The model is read from its folder or the hub."""

    origin: Origin
    device: str | None
    fingerprints: Mapping[str, str]
    """Of the model in the process that hands out work."""

    def loaded(self) -> Loaded:
        """Raises U766 where something else stands there."""
        loaded = load(self.origin.source, device=self.device, **self.origin.options)
        if (name := difference(self.fingerprints, fingerprints(loaded.model))) is not None:
            raise UsageError(
                f"{self.origin.source} holds another {name} than the model in memory; load it anew", code="U766"
            )
        return loaded


@dataclass(frozen=True)
class _Copied:
    """The model lies in Ray's shared memory."""

    shared: list[Any]
    """In a list, because Ray would fetch a bare reference for every process anew."""
    device: str

    def loaded(self) -> Loaded:
        """On the device of this process."""
        loaded: Loaded = import_module("ray").get(self.shared[0])
        return replace(loaded, model=loaded.model.to(self.device))


def readable(loaded: Loaded, device: str) -> ModelSource | None:
    """The model read again, on `device` or as its device map says; None for one that was given as an object."""
    if (origin := loaded.origin) is None:
        return None
    placed = "device_map" in origin.options
    return _Read(origin, None if placed else device, fingerprints(loaded.model))


def copied(library: Any, loaded: Loaded, device: str) -> ModelSource:
    """The model here, put into the shared memory of `library`."""
    return _Copied([library.put(loaded)], device)


_Packed = tuple[Any, torch.dtype, tuple[int, ...], str]


def as_array(tensor: torch.Tensor) -> _Packed:
    """An array, which Ray hands on without copying; of bytes, because numpy lacks some of torch's types."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat, tensor.dtype, tuple(tensor.shape), str(tensor.device)


def as_tensor(packed: _Packed) -> torch.Tensor:
    """The tensor again, on its device where this process has that, else on the CPU."""
    flat, dtype, shape, device = packed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may not be written to, and nobody does
        found = torch.from_numpy(flat).view(dtype).reshape(shape)
    wanted = torch.device(device)
    here = wanted.type == "cpu" or (
        torch.accelerator.is_available() and (wanted.index or 0) < torch.accelerator.device_count()
    )
    return found.to(wanted) if here else found
