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


def checkpointed(layer: Any, call: Call, around: Sequence[Around], shared: SharedKV | None = None) -> Any:
    """What `layer` returns. The layer itself is told not to checkpoint within."""
    call = without_caches(
        call if call[0] else ((hidden_of(call),), {k: v for k, v in call[1].items() if k != "hidden_states"})
    )
    args, kwargs = call
    bare, kept = [False], list[torch.Tensor]()

    def run(*tensors: Any) -> tuple[Any, ...]:
        kept.clear()
        own_args, own_kwargs = _sharing((tensors[: len(args)], kwargs), shared, tensors[len(args) :], kept)
        had = layer.__dict__.get("gradient_checkpointing")
        layer.gradient_checkpointing = False
        try:
            out = within(around, lambda: layer(*own_args, **own_kwargs))
        finally:
            layer.gradient_checkpointing = had
        bare[0] = not isinstance(out, tuple | list)
        return (*((out,) if bare[0] else out), *kept)

    made = layer._gradient_checkpointing_func(run, *args, *(shared.given if shared else ()))
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
