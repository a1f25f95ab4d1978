"""The record of one forward under a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from shoal.errors import PlanError
from shoal.executing.calls import Call, Place, cache_of, with_argument
from shoal.executing.slots import PassingCache
from shoal.plan import Run
from shoal.plan.sources import LayerSource


@dataclass(frozen=True)
class Segment:
    """What part of the layers a forward runs through."""

    begin: int
    state: torch.Tensor | None
    end: int


@dataclass
class Forward:
    """What later steps of one forward need of earlier ones. Born at the first layer, gone behind the last."""

    calls: dict[int, Call] = field(default_factory=dict)
    """By base layer, what the stock forward calls it with: for layers that run later than at their own place."""
    made: dict[LayerSource, Any] = field(default_factory=dict)
    """What layers made that later runs take from them: of a `LayerKV` the keys and values that it attended to."""
    behind: dict[int, torch.Tensor] = field(default_factory=dict)
    """By base layer the state behind its latest run, of those that a later run or a head reads; -1: what came in."""
    passing: PassingCache | None = None
    """The cache of a pass without one in which runs share keys and values."""
    carried: dict[str | int, Any] = field(default_factory=dict)
    """By argument: what the run before handed to the next, besides the hidden state."""
    extra: tuple[Any, ...] | None = None
    """What the last layer returned besides the hidden state."""


def with_passing_cache(
    run: Run, place: Place | None, call: Call, forward: Forward, view: Callable[[Cache], Cache]
) -> Call:
    """The call of a layer that shares keys and values, which goes through the cache's update: a pass without a cache
    gets one that stores nothing. Raises P109 for a layer that takes no cache."""
    if cache_of(call) is not None:
        return call
    if place is None:
        raise PlanError(f"layer {run.layer} is given no KV cache, so its KV cannot be shared; drop the @", code="P109")
    if forward.passing is None:
        forward.passing = PassingCache()
    return with_argument(call, place, view(forward.passing))
