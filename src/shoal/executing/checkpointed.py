"""A layer's call under gradient checkpointing, which runs it again in the backward pass.

What stands around the call (parts left out, tensors in place of the layer's own) is entered again there. What a run
takes from others, and others from it, besides the hidden state goes into the checkpointed function and comes out of it
as tensors: the second run sees what the first one saw, gradients go through, and nobody is told twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache

from shoal.errors import PlanError
from shoal.executing.calls import Call, Place, hidden_of, with_argument
from shoal.executing.slots import KeysValues, PassingCache, Store, slot_view
from shoal.plan import Run

Around = Callable[[], AbstractContextManager[Any]]
"""Makes what stands around a call."""


@dataclass(frozen=True)
class SharedKV:
    """Keys and values that a run takes and hands on; no cache is there to store them."""

    place: Place
    """Where the layer is given its cache."""
    given: tuple[torch.Tensor, ...]
    """Those of another run, or none."""
    mix: Callable[[KeysValues, tuple[torch.Tensor, ...]], KeysValues]
    """From the layer's own and `given` to what is attended to."""
    hand_on: Callable[[KeysValues], None]
    """Called once with that."""


@dataclass(frozen=True)
class SharedMap:
    """An attention map that a run takes over, or makes for others."""

    given: torch.Tensor | None
    """The one that it takes over."""
    attend: Callable[[torch.Tensor | None, Callable[[torch.Tensor], None]], AbstractContextManager[None]]
    """What stands around the call, from the map that is given and what is to be told of one that is made."""
    hand_on: Callable[[torch.Tensor], None]
    """Called once with the map that was made."""

    def around(self) -> AbstractContextManager[None]:
        """What stands around a call that is not run again."""
        return self.attend(self.given, self.hand_on)


def is_checkpointed(layer: Any) -> bool:
    """Whether a call of `layer` would be run again in the backward pass."""
    return bool(layer.training and (getattr(layer, "gradient_checkpointing", False) or _is_wrapped(layer)))


def _is_wrapped(layer: Any) -> bool:
    wrapper: Any = sys.modules.get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    return wrapper is not None and isinstance(layer, wrapper.ActivationWrapper)


def refuse_wrapped(layer: Any, run: Run) -> None:
    """Raise P121 for a layer in a wrapper that runs it again in the backward pass, without what stands around it."""
    if _is_wrapped(layer):
        raise PlanError(
            f"layer {run.layer} is in torch's checkpoint_wrapper, which would run it again without what the plan "
            "changes there; take the wrapper away and call model.gradient_checkpointing_enable()",
            code="P121",
        )


def within(around: Sequence[Around], call: Callable[[], Any]) -> Any:
    """`call()` with all that stands around it."""
    if not around:
        return call()
    with around[0]():
        return within(around[1:], call)


def checkpointed(
    layer: Any,
    call: Call,
    around: Sequence[Around],
    shared: SharedKV | None = None,
    shared_map: SharedMap | None = None,
) -> Any:
    """What `layer` returns. The layer itself is told not to checkpoint within."""
    call = without_caches(
        call if call[0] else ((hidden_of(call),), {k: v for k, v in call[1].items() if k != "hidden_states"})
    )
    args, kwargs = call
    bare, kept, maps = [False], list[torch.Tensor](), list[torch.Tensor]()
    taken = shared.given if shared else ()
    map_given = () if shared_map is None or shared_map.given is None else (shared_map.given,)

    def run(*tensors: Any) -> tuple[Any, ...]:
        kept.clear()
        maps.clear()
        rest = tensors[len(args) :]
        own_args, own_kwargs = _sharing((tensors[: len(args)], kwargs), shared, rest[: len(taken)], kept)
        within_map: tuple[Around, ...] = ()
        if shared_map is not None:
            within_map = (partial(shared_map.attend, rest[-1] if map_given else None, maps.append),)
        had = layer.__dict__.get("gradient_checkpointing")
        layer.gradient_checkpointing = False
        try:
            out = within((*around, *within_map), lambda: layer(*own_args, **own_kwargs))
        finally:
            layer.gradient_checkpointing = had
        bare[0] = not isinstance(out, tuple | list)
        return (*((out,) if bare[0] else out), *kept, *maps)

    made = layer._gradient_checkpointing_func(run, *args, *taken, *map_given)
    if maps and shared_map is not None:
        shared_map.hand_on(made[-1])
        made = made[:-1]
    if kept and shared is not None:
        made, states = made[: -len(kept)], made[-len(kept) :]
        shared.hand_on(states)
    return made[0] if bare[0] else made


def without_caches(call: Call) -> Call:
    """The call without a KV cache: a second run would store what the first one did."""
    args, kwargs = call
    return tuple(None if isinstance(a, Cache) else a for a in args), {
        name: None if isinstance(value, Cache) else value for name, value in kwargs.items()
    }


def _sharing(call: Call, shared: SharedKV | None, given: tuple[Any, ...], kept: list[torch.Tensor]) -> Call:
    """The call with a cache that stores nothing, whose answer to the layer is also `kept`."""
    if shared is None:
        return call
    mix = shared.mix

    def take(_: Store, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        attended = mix((keys, values), given)
        kept[:] = attended
        return attended

    return with_argument(call, shared.place, slot_view(PassingCache(), 0, take=take))
