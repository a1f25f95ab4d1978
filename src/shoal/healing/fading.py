"""Layers that fade out over a stage instead of being gone from its first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shoal.plan import Plan, Run


class Fading:
    """Layers at weight w: out = x + w (f(x) - x). w = 1 leaves them as they are, w = 0 hands the state on, bit for bit;
    w goes from 1 to 0 over the first `share` of a stage."""

    def __init__(self, layers: Sequence[nn.Module], share: float = 0.5) -> None:
        self.layers, self.share = list(layers), share
        self.progress = 0.0
        """From 0 at the beginning of the stage to 1 at its end."""
        self._off = False

    @property
    def weight(self) -> float:
        """How much of the layers is left."""
        return max(0.0, 1 - self.progress / self.share)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the layers have their weight, in what gradient checkpointing computes again too."""
        handles = [layer.register_forward_hook(self._weighted, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the layers are whole."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    def _weighted(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        w = 1.0 if self._off else self.weight
        if w == 1:
            return out
        entered = args[0] if args else kwargs["hidden_states"]
        made = out[0] if isinstance(out, tuple) else out
        state: torch.Tensor = entered if w == 0 else entered + w * (made - entered)
        return (state, *out[1:]) if isinstance(out, tuple) else state


def with_removed(plan: Plan, stack: str, layers: Iterable[int] | None = None) -> Plan:
    """The plan with `layers` (None: all) of those that it removes back in their places."""
    steps = list(plan.steps(stack))
    for layer in plan.dropped(stack) if layers is None else layers:
        at = next((n for n, step in enumerate(steps) if isinstance(step, Run) and step.layer > layer), len(steps))
        steps.insert(at, Run(layer))
    return plan.with_steps(tuple(steps), stack)
