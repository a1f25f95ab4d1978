"""The stock forward stays in charge: its loop over the layers meets taps that decide which real layers run.

Tap i is called with everything that the stock forward prepared for base layer i: masks, rotary tables, inputs of its
own. A step of the plan runs at the first tap by which all layers it needs have been offered, so a plan that keeps the
order runs inside the very iterations it belongs to (values that the loop carries along stay right) and a reordered one
runs as soon as it can. The hidden state always travels through the stock loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from shoal.errors import PlanError
from shoal.executing.lent import every_name, has_ties, lent
from shoal.executing.paged import Obstacle, paging_obstacle, refuse_paged
from shoal.executing.slots import KeysValues, PassingCache, fit_rows, prepare_views, slot_view
from shoal.executing.weights import Tensors
from shoal.models.first import first_only
from shoal.models.parts import without
from shoal.models.probe import Probe
from shoal.models.stacks import Stack
from shoal.plan import Exit, Map, Parallel, Run, Step
from shoal.plan.steps import kv_source, layers_read, runs, writes_kv
from shoal.plan.tensors import MAP_TENSORS, tensors_of


@dataclass
class Pass:
    """One forward: what was recorded for later steps. Born at the first tap, gone with the last."""

    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    states: dict[int, KeysValues] = field(default_factory=dict)
    """Keys and values by base layer, for the runs that read them."""
    passing: PassingCache | None = None
    carried: dict[str | int, Any] = field(default_factory=dict)
    """By argument: what the run before handed to the next, besides the hidden state."""
    extra: tuple[Any, ...] | None = None
    """What the last layer returned besides the hidden state."""


class PlannedList(nn.ModuleList):
    """Stands in for a model's list of layers: the same children under the same names, but iterating yields taps."""

    stands_in = True

    def __init__(
        self,
        stack: Stack,
        probe: Probe,
        steps: tuple[Step, ...],
        weights: Tensors,
        conduct: Callable[..., Conductor] | None = None,
    ) -> None:
        """`conduct` makes the conductor; by default one for plans in which nothing is decided at run time."""
        super().__init__()
        self._modules = stack.layers._modules  # shared: what PEFT or accelerate change later is seen here too
        self.__dict__["conductor"] = (conduct or Conductor)(self, stack, probe, steps, weights)
        self.__dict__["_taps"] = [Tap(self.__dict__["conductor"], i) for i in range(len(self._modules))]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__["_taps"])

    def __getitem__(self, index: Any) -> Any:
        return self.__dict__["_taps"][index]


class Tap:
    """Stands for one base layer in the stock loop; anything but calling it reaches the real layer."""

    def __init__(self, conductor: Conductor, index: int) -> None:
        self.conductor, self.index = conductor, index

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy asks for these before there is a conductor
            raise AttributeError(name)
        return getattr(self.conductor.layer(self.index), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.conductor.tap(self.index, args, kwargs)


class Conductor:
    """Runs the steps of one stack's plan at the taps."""

    def __init__(
        self, planned: PlannedList, stack: Stack, probe: Probe, steps: tuple[Step, ...], weights: Tensors
    ) -> None:
        self.planned = planned
        self.facts = probe.layers
        self.use(weights)
        self.tied: dict[int, bool] = {}
        """Layers in which a parameter has several names, as far as it was asked."""
        self.carried = {at: n for fact in self.facts for at, n in fact.carried.items()}
        self.due, self.kept = _schedule(steps, stack.depth)
        self.slots = _slots(steps)
        self.rows = tuple(self.facts[run.layer].row for run in runs(steps) if writes_kv(run))
        self.sources = layers_read(steps)
        # a plan that runs every layer once, whole and in order needs no view: the layers' own rows are right
        self.plain = self.rows == tuple(fact.row for fact in self.facts) and not self.sources
        # a layer in place is called with what its tap was given, unless a later step needs that as well
        self.through = [
            self.plain and i not in self.kept and [step for _, step in due] == [Run(i)]
            for i, due in enumerate(self.due)
        ]
        if self.kept:
            self.through[-1] = False  # where what was kept is forgotten
        self.first = first_only(stack)
        self.unpaged: Obstacle | None = paging_obstacle(steps)
        self.now = Pass()
        prepare_views(DynamicCache, StaticCache, PassingCache)

    def use(self, weights: Tensors) -> None:
        """From now on these are the plan's tensors."""
        self.weights = weights
        self._own: dict[str, dict[str, torch.Tensor]] = {}

    def _owned(self, name: str) -> dict[str, torch.Tensor]:
        """The plan's tensors of that name, by their names in the layer."""
        if name not in self._own:
            self._own[name] = tensors_of(name, self.weights)
        return self._own[name]

    def layer(self, index: int) -> Any:
        """The real layer, looked up anew: PEFT or accelerate may have exchanged it."""
        return self.planned._modules[str(index)]

    def tap(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called by the stock loop in place of layer `index`."""
        if index == 0:
            self.now = Pass()
            refuse_paged(self.unpaged, kwargs)
            if not self.plain:
                for value in (*args, *kwargs.values()):
                    if isinstance(value, Cache):
                        fit_rows(value, self.rows)
        steps = self.due[index]
        if self.through[index]:
            return self.layer(index)(*args, **kwargs)
        if index in self.kept:
            self.now.calls[index] = (args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        self.now.carried = {at: _argument(at, args, kwargs) for at in self.carried}
        for position, step in steps:
            hidden = self._step(position, step, hidden, index, args, kwargs)
        returned = self.passed(index, hidden)
        if index == len(self.due) - 1:
            self.now = Pass()  # nothing of this forward outlives it
        return returned

    def passed(self, index: int, hidden: torch.Tensor) -> Any:
        """`hidden` in the shape in which layer `index` returns it."""
        tail = self.facts[index].tail
        if tail < 0:
            return hidden
        extra = self.now.extra
        return (hidden, *(extra if extra is not None and len(extra) == tail else [None] * tail))

    def _step(
        self, position: int, step: Step, hidden: torch.Tensor, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        match step:
            case Run():
                return self._run(step, self.slots.get((position, 0)), hidden, index, args, kwargs)
            case Parallel():
                changes = [
                    self._run(branch, self.slots.get((position, n)), hidden, index, args, kwargs) - hidden
                    for n, branch in enumerate(step.branches)
                ]
                total = torch.stack(changes).sum(0)
                return hidden + (total / len(changes) if step.join == "mean" else total)
            case Map():
                return self._map(step, hidden)
            case Exit():
                return hidden

    def _run(
        self,
        run: Run,
        slot: int | None,
        hidden: torch.Tensor,
        index: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        if run.layer != index:
            args, kwargs = self.now.calls[run.layer]
        if self.carried:
            args = tuple(self.now.carried.get(at, value) for at, value in enumerate(args))
            kwargs = {at: self.now.carried.get(at, value) for at, value in kwargs.items()}
        layer, fact = self.layer(run.layer), self.facts[run.layer]
        swap = partial(self._cache_for, run, slot)
        if args:
            args = (hidden, *(swap(a) if isinstance(a, Cache) else a for a in args[1:]))
            kwargs = {k: swap(v) if isinstance(v, Cache) else v for k, v in kwargs.items()}
        else:
            kwargs = {k: swap(v) if isinstance(v, Cache) else v for k, v in kwargs.items()} | {"hidden_states": hidden}
        if (run.layer in self.sources or kv_source(run) is not None) and run.part != "mlp":
            args, kwargs = self._share_without_cache(run, layer, fact.cache_at, args, kwargs)
        with self._as_first(run.layer):
            out = (
                layer(*args, **kwargs)
                if run.part == "layer" and run.weights is None
                else self._special(run, args, kwargs)
            )
        if isinstance(out, tuple | list):
            self.now.extra = tuple(out[1:])
            self.now.carried = {at: out[1 + n] for at, n in self.carried.items()}
            return out[0]
        return out

    def _as_first(self, index: int) -> AbstractContextManager[None]:
        """The layer that runs first makes what all others are handed, with what layer 0 owns for it."""
        if self.first is None or index == 0 or self.now.extra is not None:
            return nullcontext()
        return self.first.lent_to(self.layer(index))

    def _cache_for(self, run: Run, slot: int | None, cache: Cache) -> Cache:
        keep = None
        if run.layer in self.sources:
            keep = partial(self.now.states.__setitem__, run.layer)
        source = kv_source(run)
        read = None if source is None else self.now.states[source]
        return slot_view(cache, 0 if slot is None else slot, read=read, keep=keep)

    def _share_without_cache(
        self, run: Run, layer: nn.Module, place: str | int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Sharing goes through the cache's update; a pass without a cache gets one that stores nothing."""
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise PlanError(
                f"layer {run.layer} shares KV, which gradient checkpointing takes away; switch one of them off",
                code="P121",
            )
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            return args, kwargs
        if place is None:
            raise PlanError(
                f"layer {run.layer} is given no KV cache, so its KV cannot be shared; drop the @", code="P109"
            )
        if self.now.passing is None:
            self.now.passing = PassingCache()
        view = self._cache_for(run, 0, self.now.passing)
        if isinstance(place, int):
            return (*args[:place], view, *args[place + 1 :]), kwargs
        return args, kwargs | {place: view}

    def _special(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A part of a layer, or a layer with other weights; gradient checkpointing replays the whole exchange."""
        layer = self.layer(run.layer)
        if layer.training and getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled():
            kwargs = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
            return layer._gradient_checkpointing_func(partial(self._exchanged, run, True, **kwargs), *args)
        return self._exchanged(run, False, *args, **kwargs)

    def _exchanged(self, run: Run, replayed: bool, *args: Any, **kwargs: Any) -> Any:
        layer, fact = self.layer(run.layer), self.facts[run.layer]
        names: tuple[str, ...] = ()
        if run.part != "layer":
            assert fact.parts is not None  # check P105
            names = fact.parts.mlp if run.part == "attention" else fact.parts.attention
        had = layer.__dict__.get("gradient_checkpointing")
        if replayed:
            layer.gradient_checkpointing = False
        try:
            tensors = {} if run.weights is None else self._owned(run.weights)
            if tensors and run.layer not in self.tied:
                self.tied[run.layer] = has_ties(layer)
            if tensors and self.tied[run.layer]:
                tensors = every_name(layer, tensors)
            # tensors first: a stub in the place of a part has none to exchange
            with lent(layer, tensors), without(layer, names, fact.returns):
                return layer(*args, **kwargs)
        finally:
            if replayed:
                layer.gradient_checkpointing = had

    def _map(self, step: Map, hidden: torch.Tensor) -> torch.Tensor:
        """y = x W^T + b, y = x + up(inner(x)) + b or y = scale * x + b; x is [..., hidden]. With a limit, tokens whose
        norm is larger are handed on as they are: an attention sink, a hundred times as long as the others, would be
        moved by more than a layer ever moves it. This asks for no position, so it holds with any cache and padding."""
        found = (self.weights.get(f"{step.weights}.{n}") for n in MAP_TENSORS)
        # the layers of one model may be on several devices, and a map stands between two of them
        weight, bias, gate, down, up, scale, limit = (None if t is None else t.to(hidden.device) for t in found)
        if weight is not None:
            out = nn.functional.linear(hidden, weight, bias)
        elif up is not None:
            out = hidden + nn.functional.linear(_inner(hidden, gate, down), up, bias)
        else:
            assert scale is not None  # check P112
            out = hidden * scale if bias is None else hidden * scale + bias
        if limit is None:
            return out
        # half precision cannot hold the square of an outlier
        return torch.where(hidden.float().norm(dim=-1, keepdim=True) <= limit.float(), out, hidden)


def _inner(hidden: torch.Tensor, gate: torch.Tensor | None, down: torch.Tensor | None) -> torch.Tensor:
    """down(x), silu(gate(x)), or their product."""
    down_x = None if down is None else nn.functional.linear(hidden, down)
    gate_x = None if gate is None else nn.functional.silu(nn.functional.linear(hidden, gate))
    if down_x is None or gate_x is None:
        found = gate_x if down_x is None else down_x
        assert found is not None  # check P112
        return found
    return gate_x * down_x


def _argument(at: str | int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get(at) if isinstance(at, str) else args[at] if at < len(args) else None


def _schedule(steps: tuple[Step, ...], depth: int) -> tuple[list[list[tuple[int, Step]]], set[int]]:
    """For each tap the (position, step) pairs that run there, and the layers whose arguments must be kept for later."""
    due: list[list[tuple[int, Step]]] = [[] for _ in range(depth)]
    kept: set[int] = set()
    tap = 0
    for position, step in enumerate(steps):
        layers = [run.layer for run in runs((step,))]
        tap = max([tap, *layers])
        due[tap].append((position, step))
        kept |= {layer for layer in layers if layer < tap}
    return due, kept


def _slots(steps: tuple[Step, ...]) -> dict[tuple[int, int], int]:
    """The cache slot of every run that stores KV, by (position of the step, branch)."""
    slots: dict[tuple[int, int], int] = {}
    for position, step in enumerate(steps):
        for branch, run in enumerate(runs((step,))):
            if writes_kv(run):
                slots[position, branch] = len(slots)
    return slots
