"""Single layers tried on states of one token: what CLaSp and its kin look at before they choose."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from shoal.errors import UsageError
from shoal.executing.conductor import Conductor, Pass, PlannedList
from shoal.executing.slots import slot_view
from shoal.plan.steps import Run
from shoal.speculating.feed import Feed
from shoal.speculating.rows import lent
from shoal.speculating.stage import Stage

Calls = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
"""Layer -> what the stock forward calls it with."""


class Bench:
    """Layers at the place of the last token, reading the base model's own rows and writing to none of them."""

    def __init__(self, stage: Stage, feed: Feed, cache: Cache, ids: torch.Tensor) -> None:
        """Raises U618 for a model whose layers hand more than the hidden state to each other."""
        require_separable(stage)
        self.stage, self.cache = stage, cache
        self.calls: Calls = {}
        spare = lent(cache, range(len(cache.layers)), 0)
        stage.through(_Notes(self.calls, stage), feed, ids, spare)
        args, kwargs = self.calls[0]
        self.start: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        """What enters layer 0, [1, 1, hidden]."""
        self._conductor = _Trial(stage.list, stage.stack, stage.probe, (), {})
        self._together: bool | None = None

    def run(self, step: Run, states: torch.Tensor) -> torch.Tensor:
        """`states`, [n, 1, hidden], through one layer or a part of it, each on its own."""
        if len(states) == 1:
            return self._run(step, states)
        if self._together is None:
            self._together = self._same(step, states)
        if self._together:
            return self._run(step, states)
        return torch.cat([self._run(step, states[n : n + 1]) for n in range(len(states))])

    def _same(self, step: Run, states: torch.Tensor) -> bool:
        """Some families prepare tensors for a batch of one (ALiBi); their layers are tried one state at a time."""
        try:
            both = self._run(step, states[:2])
        except RuntimeError:
            return False
        apart = torch.cat([self._run(step, states[n : n + 1]) for n in range(2)])
        return torch.allclose(both, apart, rtol=1e-2, atol=1e-2 * float(apart.abs().max()))

    def _run(self, step: Run, states: torch.Tensor) -> torch.Tensor:
        conductor, row = self._conductor, self.stage.probe.layers[step.layer].row
        conductor.cache = _spread(self.cache, row, len(states))
        conductor.row = row
        conductor.now = Pass(calls=self.calls)
        try:
            return conductor._step(-1, step, states, -1, (), {})
        finally:
            conductor.now = Pass()


def require_separable(stage: Stage) -> None:
    """Raise U618 when a layer of the model cannot be tried alone."""
    needy = next((layer.index for layer in stage.spec.stack("decoder").layers if layer.needs), None)
    carried = next((i for i, fact in enumerate(stage.probe.layers) if fact.carried), None)
    found = needy if needy is not None else carried
    if found is not None:
        raise UsageError(
            f"layer {found} of {type(stage.model).__name__} is handed more than a hidden state by the layers before "
            "it, so layers cannot be tried one by one; use a draft of fixed layers (exit, skip) or swift",
            code="U618",
        )


class _Trial(Conductor):
    """Gives each layer a cache of its own to write to."""

    cache: Cache
    row: int = 0

    def _cache_for(self, run: Run, slot: int | None, cache: Cache) -> Cache:
        return slot_view(self.cache, self.row)


def _spread(cache: Cache, row: int, times: int) -> Cache:
    """A cache whose row `row` is a copy with the same past for `times` states."""
    out = copy.copy(cache)
    out.layers = list(cache.layers)
    out.layers[row] = one = copy.copy(cache.layers[row])
    if times > 1 and one.keys is not None:
        one.keys, one.values = (t.expand(times, *t.shape[1:]) for t in (one.keys, one.values))
    return out


class _Notes:
    """Layers that write down what they are called with and hand the state on."""

    def __init__(self, calls: Calls, stage: Stage) -> None:
        self.taps: list[Any] = [_Note(index, stage, calls) for index in range(stage.depth)]


class _Note:
    def __init__(self, index: int, stage: Stage, calls: Calls) -> None:
        self.index, self.stage, self.calls = index, stage, calls

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._layer(), name)

    def _layer(self) -> nn.Module:
        planned: PlannedList = self.stage.list
        layer = planned._modules[str(self.index)]
        assert layer is not None
        return layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls[self.index] = (args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        tail = self.stage.probe.layers[self.index].tail
        return hidden if tail < 0 else (hidden, *[None] * tail)
