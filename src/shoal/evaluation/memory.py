"""Bytes that are really held: the model's weights, and its cache after a prefill."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch

from shoal.errors import UsageError
from shoal.evaluation.decoding import Stepper, random_tokens
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.models.packed import unpacked


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, measured on the live model. A plan that only runs live still holds the weights it leaves out."""

    weight_bytes: int
    """Parameters and persistent buffers, each storage once."""
    kv_bytes: int
    """What the cache's tensors address after the prefill, recurrent states included; shared rows count once."""
    kv_held_bytes: int
    """The storages behind them: more where a row is a window into a longer tensor."""
    kv_bytes_per_token: int
    """By how much one more token lets the cache of one sequence grow while no window is full."""
    batch: int
    prompt: int
    device: str
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def memory(model: Any, *, prompt: int = 512, batch: int = 1) -> Memory:
    """Measure weights, and the cache after a prefill of `batch` sequences of `prompt` random tokens.

    Raises `UsageError`: U510 context too short, U514 an empty shape, U515 a model without a cache.
    """
    if prompt < 1:
        raise UsageError(f"a prompt of {prompt} tokens fills no cache; use 1 or more", code="U514")
    ids = random_tokens(model, batch, max(prompt, 2), seed=0)
    step = Stepper(model)
    with evaluating(model):
        cache = step(ids[:, :1])
        before = _addressed(tensors_of(cache))
        growth = _addressed(tensors_of(step(ids[:, 1:2], 1, cache))) - before
        held = list(tensors_of(step(ids[:, :prompt])))
    return Memory(
        weight_bytes=_stored(model.state_dict().values()),
        kv_bytes=_addressed(held),
        kv_held_bytes=_stored(held),
        kv_bytes_per_token=growth // batch,
        batch=batch,
        prompt=prompt,
        device=str(device_of(model)),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """All tensors that a cache, row, list or dict holds; counters, which have no dimensions, are no state."""
    if isinstance(value, torch.Tensor):
        if value.ndim:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)
    else:
        for row in getattr(value, "layers", ()):
            yield from tensors_of(vars(row))


def values_held(cache: Any) -> int:
    """Numbers that a KV cache holds, each once however many rows use it; indices and counters are none."""
    return sum(_elements(tensor for tensor in tensors_of(cache) if tensor.is_floating_point()).values())


def _elements(tensors: Iterable[torch.Tensor]) -> dict[Any, int]:
    return {(t.device, t.data_ptr(), t.shape, t.dtype): t.numel() for t in tensors}


def _addressed(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the elements, where tensors over the same elements count once."""
    return sum(number * key[-1].itemsize for key, number in _elements(tensors).items())


def _stored(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages, each once; on `meta`, where storages have no address, of the tensors."""
    unique: dict[tuple[torch.device, int], int] = {}
    for tensor in chain.from_iterable(map(unpacked, tensors)):
        if tensor.device.type == "meta":
            unique[tensor.device, id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            unique[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(unique.values())
