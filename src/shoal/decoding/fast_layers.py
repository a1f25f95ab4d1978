"""Layers and the output head, compiled one by one and only while tokens are decoded.

All layers of one kind share one compiled function, so compiling takes the time of one layer, not of the depth, and a
plan that drops, repeats or reorders layers needs nothing compiled anew. For that a layer must not see where it stands:
it is given a cache of one row, its own, whatever index it asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from shoal.executing.slots import KeysValues
from shoal.models.opened import open_model
from shoal.models.stacks import Stack

Call = Callable[..., Any]


class RowCache(Cache):
    """One row of a cache, to whatever `layer_idx` the layer asks for."""

    def __init__(self, row: Any) -> None:
        self.row = row  # not the init of Cache: that one makes layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> KeysValues:
        found: KeysValues = self.row.update(key_states, value_states, *args, **kwargs)
        return found

    def get_seq_length(self, layer_idx: int = 0) -> int:
        length: int = self.row.get_seq_length()
        return length


class SharedRow(Cache):
    """Keys and values of another layer; stores nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> KeysValues:
        return self.keys, self.values


def _called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module._call_impl(*args, **kwargs)


def compiled_call(options: dict[str, Any] | None, backend: str, dynamic: bool | None) -> Call:
    """`f(module, args, kwargs)`, compiled once for each kind of module and shape.

    Each call of this makes code of its own, so that what was compiled for one setting neither counts against the
    compiler's limit of variants for another nor is looked through for it.
    """
    own = FunctionType(_called.__code__.replace(), _called.__globals__, "decode_step")
    return torch.compile(own, backend=backend, dynamic=dynamic, options=options)


class CompiledLayer:
    """Stands in for `module.__call__` while decoding: hands the compiled function the layer's own row of the cache."""

    def __init__(self, module: nn.Module, row: int, call: Call) -> None:
        self.module, self.row, self.call = module, row, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        keep, stored = None, None
        for name, value in kwargs.items():
            if isinstance(value, Cache):
                kwargs[name], keep, stored = _own_row(value, self.row)
        if any(isinstance(value, Cache) for value in args):
            place = next(n for n, value in enumerate(args) if isinstance(value, Cache))
            own, keep, stored = _own_row(args[place], self.row)
            args = (*args[:place], own, *args[place + 1 :])
        out = self.call(self.module, args, kwargs)
        if keep is not None and stored is not None:  # a static row answers one token with the tensors it stores
            keep((stored.keys, stored.values))
        return out


def _own_row(cache: Cache, row: int) -> tuple[Cache, Any, Any]:
    """What the layer is given in place of `cache`, who wants its keys and values, and the row that will hold them."""
    read, keep = getattr(cache, "_read", None), getattr(cache, "_keep", None)
    if read is not None:
        return SharedRow(*read), None, None
    inner = getattr(cache, "_inner", None)  # the executor's view of one slot
    stored = cache.layers[row] if inner is None else inner.layers[cache._row]
    return RowCache(stored), keep, stored


class CompiledHead:
    """Stands in for `module.__call__` of the output head."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        self.module, self.call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.module, args, kwargs)


def compiled_calls(model: Any, stack: Stack, call: Call) -> list[tuple[nn.Module, Any]]:
    """Every layer of `stack` and the model's output head, with what stands in for calling it."""
    facts = open_model(model).facts(stack.name).layers
    calls: list[tuple[nn.Module, Any]] = [
        (stack.layer(i), CompiledLayer(stack.layer(i), facts[i].row, call)) for i in range(stack.depth)
    ]
    head = model.get_output_embeddings()
    return calls if head is None else [*calls, (head, CompiledHead(head, call))]


@contextmanager
def standing_in(calls: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Call the compiled functions in place of the modules, and the modules again at the end whatever happens."""
    before = [module._compiled_call_impl for module, _ in calls]
    try:
        for module, call in calls:
            module._compiled_call_impl = call
        yield
    finally:
        for (module, _), own in zip(calls, before, strict=True):
            module._compiled_call_impl = own
