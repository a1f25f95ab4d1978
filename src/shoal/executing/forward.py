"""The record of one forward under a plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shoal.executing.calls import Call
from shoal.executing.slots import KeysValues, PassingCache


@dataclass
class Forward:
    """What later steps of one forward need of earlier ones. Born at the first layer, gone behind the last."""

    calls: dict[int, Call] = field(default_factory=dict)
    """By base layer, what the stock forward calls it with: for layers that run later than at their own place."""
    kv: dict[int, KeysValues] = field(default_factory=dict)
    """By base layer, the keys and values that it attended to, for the runs that read them."""
    passing: PassingCache | None = None
    """The cache of a pass without one in which runs share keys and values."""
    carried: dict[str | int, Any] = field(default_factory=dict)
    """By argument: what the run before handed to the next, besides the hidden state."""
    extra: tuple[Any, ...] | None = None
    """What the last layer returned besides the hidden state."""
