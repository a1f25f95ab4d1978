"""One call of a layer, listened to: what it hands to its cache and to its attention function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.models.lists import Stack

KeysValues = tuple[torch.Tensor, torch.Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a layer."""
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(queries, keys, values), each [batch, heads, tokens, dim], to the context [batch, tokens, heads, dim of a value]."""
NAME = "shoal_probe"
"""Under this name transformers knows the attention function that only listens."""
TOKENS = 3


@dataclass
class Heard:
    """What one call of a layer showed."""

    stored: list[KeysValues] = field(default_factory=list)
    """What it handed to the cache."""
    asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Queries, keys and values of its attention function; empty where it works its attention out itself."""
    out: torch.Tensor | None = None
    """The hidden state that it made."""


def heard(
    layer: nn.Module,
    place: int | str | None,
    call: Call,
    *,
    given: KeysValues | Callable[[torch.Tensor, torch.Tensor], KeysValues] | None = None,
    attend: Attend | None = None,
    into: Heard | None = None,
) -> Heard:
    """Call `layer` over a cache that notes what is stored and hands back these, or the `given` keys and values, or what
    `given` makes of them.

    `place`: where the layer is given its cache. `attend`: the attention function meanwhile, in place of the model's
    own; it must have asked through transformers' interface. `into`: what is filled while the layer runs. Raises what
    the layer raises.
    """
    seen = Heard() if into is None else into

    def note(keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        seen.stored.append((keys.clone(), values.clone()))
        return given(keys, values) if callable(given) else given or (keys, values)

    def listen(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        seen.asked.append((queries.clone(), keys.clone(), values.clone()))
        return (attend or no_context)(queries, keys, values)

    args, kwargs = call
    if isinstance(place, int):
        args = (*args[:place], _Listening(note), *args[place + 1 :])
    elif place is not None:
        kwargs = kwargs | {place: _Listening(note)}
    if attend is None:
        out = layer(*args, **kwargs)
    else:
        with _asking(layer, listen):
            out = layer(*args, **kwargs)
    seen.out = out[0] if isinstance(out, tuple | list) else out
    return seen


def sample_calls(model: nn.Module, stack: Stack) -> list[Call]:
    """What each layer of a stack is called with for a sequence of `TOKENS` different tokens. Raises what the model
    raises."""
    calls: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    handles = [stack.layer(i).register_forward_pre_hook(hook, with_kwargs=True) for i in range(stack.depth)]
    ids = torch.arange(1, TOKENS + 1, device=device_of(model))[None]
    try:
        with evaluating(model):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def no_context(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Zeros in the shape of what an attention function answers."""
    return values.new_zeros(queries.shape[0], queries.shape[2], queries.shape[1], values.shape[-1])


def without_cache(call: Call) -> Call:
    """The call with None in the place of a cache."""
    args, kwargs = call
    return (
        tuple(None if isinstance(a, Cache) else a for a in args),
        {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()},
    )


def without_values(value: Any) -> Any:
    """The same with tensors on the meta device, and None for a cache."""
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="meta", requires_grad=False)
    if isinstance(value, dict):
        return {key: without_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_values, value)) if type(value) in (list, tuple) else None
    return None if isinstance(value, Cache) else value


class _Listening(Cache):
    """A cache that holds nothing and asks a function what is to be attended to."""

    def __init__(self, note: Callable[[torch.Tensor, torch.Tensor], KeysValues]) -> None:
        super().__init__(layers=[])
        self.note = note

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> KeysValues:
        return self.note(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@contextmanager
def _asking(layer: nn.Module, attend: Attend) -> Iterator[None]:
    """Meanwhile the layer asks transformers for an attention function of ours."""
    saved: list[tuple[dict[str, Any], Any]] = []
    for module in layer.modules():
        own = module.__dict__.get("config")
        if own is not None and hasattr(own, "_attn_implementation_internal"):
            other = copy.copy(own)
            other.__dict__.update(_attn_implementation_internal=NAME, _shoal_probe=attend)
            saved.append((module.__dict__, own))
            module.__dict__["config"] = other
    try:
        yield
    finally:
        for place, own in saved:
            place["config"] = own


def _called(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    return module.config._shoal_probe(query, key, value), None


AttentionInterface.register(NAME, _called)
