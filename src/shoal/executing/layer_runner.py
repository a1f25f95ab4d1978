"""How one layer is called: as it is, without a part, or with tensors in place of its own; and what a map computes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache

from shoal.executing.calls import Call, first_state
from shoal.executing.exchange import Exchange
from shoal.executing.fitted_map import FittedMap
from shoal.executing.layer_list import LayerProxyList
from shoal.executing.weights import Tensors
from shoal.models.examine import LayerFacts
from shoal.models.first import first_only
from shoal.models.lists import Stack
from shoal.plan import Map, Run
from shoal.plan.tensors import tensors_of


class LayerRunner:
    """Calls the layers of one stack, with what each run changes in its layer prepared once."""

    def __init__(self, planned: LayerProxyList, stack: Stack, facts: list[LayerFacts], tensors: Tensors) -> None:
        self.planned, self.facts, self.tensors = planned, facts, tensors
        self.first = first_only(stack)
        self._maps: dict[str, FittedMap] = {}
        self._exchanges: dict[tuple[int, str, str | None], Exchange] = {}

    def layer(self, index: int) -> Any:
        """The real layer, looked up anew: PEFT or accelerate may have exchanged it."""
        return self.planned._modules[str(index)]

    def call(self, run: Run, call: Call, *, comes_first: bool = False) -> Any:
        """What the layer of `run` returns. The layer that `comes_first` in a forward makes what all others are handed,
        with what layer 0 owns for it."""
        if self.first is None or run.layer == 0 or not comes_first:
            return self._called(run, call)
        with self.first.shared_with(self.layer(run.layer)):
            return self._called(run, call)

    def _called(self, run: Run, call: Call) -> Any:
        """Gradient checkpointing replays the whole exchange."""
        layer, (args, kwargs) = self.layer(run.layer), call
        if run.part == "layer" and run.weights is None:
            return layer(*args, **kwargs)
        if layer.training and getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled():
            kwargs = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
            return layer._gradient_checkpointing_func(partial(self._replayed, run, **kwargs), *args)
        with self._exchange(run).in_place():
            return layer(*args, **kwargs)

    def behind_attention(self, index: int, call: Call) -> torch.Tensor:
        """The state that a layer makes without its mlp, past `__call__`, so that no hook of the user's fires twice."""
        layer, parts, (args, kwargs) = self.layer(index), self.facts[index].parts, call
        assert parts is not None
        with Exchange(layer, parts.mlp, self.facts[index].returns, {}).in_place():
            found: torch.Tensor = first_state(layer.forward(*args, **kwargs))
        return found

    def map(self, step: Map, hidden: torch.Tensor) -> torch.Tensor:
        """What a fitted map makes of the state."""
        found = self._maps.get(step.weights)
        if found is None:
            found = self._maps[step.weights] = FittedMap(self._tensors_of(step.weights))
        return found(hidden)

    def _replayed(self, run: Run, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer(run.layer)
        had = layer.__dict__.get("gradient_checkpointing")
        layer.gradient_checkpointing = False
        try:
            with self._exchange(run).in_place():
                return layer(*args, **kwargs)
        finally:
            layer.gradient_checkpointing = had

    def _exchange(self, run: Run) -> Exchange:
        """What `run` changes in its layer for the length of one call."""
        key, layer = (run.layer, run.part, run.weights), self.layer(run.layer)
        found = self._exchanges.get(key)
        if found is None or found.layer is not layer:
            fact = self.facts[run.layer]
            left_out: tuple[str, ...] = ()
            if run.part != "layer":
                assert fact.parts is not None  # check P105
                left_out = fact.parts.mlp if run.part == "attention" else fact.parts.attention
            found = self._exchanges[key] = Exchange(layer, left_out, fact.returns, self._tensors_of(run.weights))
        return found

    def _tensors_of(self, name: str | None) -> dict[str, torch.Tensor]:
        """The plan's tensors of that name, by their names in the layer."""
        return {} if name is None else tensors_of(name, self.tensors)
