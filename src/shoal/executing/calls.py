"""What a layer is called with, and the places of things in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a layer."""
Place = str | int
"""The keyword or the position of an argument."""


def argument(call: Call, place: Place) -> Any:
    """What the call gives at `place`; None when it gives nothing there."""
    args, kwargs = call
    return kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None


def with_argument(call: Call, place: Place, value: Any) -> Call:
    """The call with another value at `place`."""
    args, kwargs = call
    if isinstance(place, int):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, kwargs | {place: value}


def hidden_of(call: Call) -> torch.Tensor:
    """The hidden state that a layer is called with, [batch, tokens, hidden] in most families."""
    args, kwargs = call
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def with_hidden(call: Call, hidden: Any) -> Call:
    """The call with another hidden state."""
    return with_argument(call, 0 if call[0] else "hidden_states", hidden)


def values_of(call: Call) -> Iterator[Any]:
    """All arguments."""
    yield from call[0]
    yield from call[1].values()


def caches_of(call: Call) -> Iterator[Cache]:
    """The KV caches among the arguments."""
    return (value for value in values_of(call) if isinstance(value, Cache))


def cache_of(call: Call) -> Cache | None:
    """The KV cache that a layer is called with, if any."""
    return next(caches_of(call), None)


def first_state(out: Any) -> Any:
    """The hidden state of what a layer returns, alone or in front of other values."""
    return out[0] if isinstance(out, tuple | list) else out
