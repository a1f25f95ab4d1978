"""How one layer is called: as it is, without a part, or with tensors in place of its own; and what a map computes."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, assert_never

import torch

from shoal.executing.calls import Call, first_state
from shoal.executing.checkpointed import (
    Around,
    SharedKV,
    SharedMap,
    checkpointed,
    is_checkpointed,
    refuse_wrapped,
    within,
)
from shoal.executing.exchange import Exchange
from shoal.executing.fitted_map import FittedMap
from shoal.executing.layer_list import LayerProxyList
from shoal.executing.looked_up import TensorsOf, TiedTensors
from shoal.executing.modules import ModuleTensors
from shoal.executing.sharded import refuse_sharded
from shoal.executing.weights import Tensors
from shoal.models.examine import LayerFacts
from shoal.models.first import first_only
from shoal.models.lists import Stack
from shoal.plan import Map, Run, Step
from shoal.plan.sources import StackLayer
from shoal.plan.steps import runs


def _note(made: dict[str, Any], name: str, _: Any, __: Any, out: Any) -> None:
    made[name] = out


@contextmanager
def replayed(layer: torch.nn.Module, made: Mapping[str, Any]) -> Iterator[None]:
    """Meanwhile the children of `layer` that are named in `made` return that, whatever they are called with."""
    children: dict[str, Any] = layer._modules
    saved = {name: children[name] for name in made}
    try:
        for name, out in made.items():
            children[name] = _Replay(saved[name], out)
        yield
    finally:
        children.update(saved)


class _Replay(torch.nn.Module):
    """Stands for a child that has been called already."""

    def __init__(self, child: Any, out: Any) -> None:
        super().__init__()
        self.__dict__.update(_child=child, _out=out)  # not registered: its parameters must not appear twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_child"], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.__dict__["_out"]


class LayerRunner:
    """Calls the layers of one stack, with what each run changes in its layer prepared once."""

    def __init__(self, planned: LayerProxyList, stack: Stack, facts: list[LayerFacts], tensors: Tensors) -> None:
        self.planned, self.facts, self.tensors = planned, facts, tensors
        self.modules = tensors if isinstance(tensors, ModuleTensors) else None
        self.first = first_only(stack)
        self._maps: dict[str, FittedMap] = {}
        self._exchanges: dict[tuple[Any, ...], Exchange] = {}

    def layer(self, index: int) -> Any:
        """The real layer, looked up anew: PEFT or accelerate may have exchanged it."""
        return self.planned.real(index)

    def layer_of(self, run: Run) -> Any:
        """What is called for `run`: the module of its own tensors where they are one, else the base layer."""
        own = None if self.modules is None else self.modules.layer(run.weights)
        return self.layer(run.layer) if own is None else own

    def called(self, steps: tuple[Step, ...]) -> list[tuple[int, Any]]:
        """Every layer that may be called for these steps, with its base index: the real ones and those that are modules
        of the plan's tensors."""
        own = {run.weights: (run.layer, self.layer_of(run)) for run in runs(steps) if not self._lends(run)}
        own.pop(None, None)
        return [*((int(name), layer) for name, layer in self.planned._modules.items()), *own.values()]

    def call(
        self,
        run: Run,
        call: Call,
        *,
        comes_first: bool = False,
        around: Sequence[Around] = (),
        shared: SharedKV | None = None,
        shared_map: SharedMap | None = None,
    ) -> Any:
        """What the layer of `run` returns. The layer that `comes_first` in a forward makes what all others are handed,
        with what layer 0 owns for it. `around`: what else stands around the call. `shared`: keys and values that go
        into a checkpointed call and come out of it. `shared_map`: the attention map that it takes over or hands on."""
        layer, (args, kwargs) = self.layer_of(run), call
        if run.part != "layer" or run.tied_to is not None or self._lends(run) or self._unused(run):
            around = (lambda: self._exchange(run).in_place(), *around)  # first: the others find its tensors there
        if comes_first and run.layer != 0 and self.first is not None:
            around = (*around, partial(self.first.shared_with, layer))
        if not around and shared is None and shared_map is None:
            return layer(*args, **kwargs)
        refuse_wrapped(layer, run)
        shares = shared is not None or shared_map is not None
        if is_checkpointed(layer) and (shares or torch.is_grad_enabled()):
            return checkpointed(layer, call, around, shared, shared_map)
        if shared_map is not None:
            around = (*around, shared_map.around)
        return within(around, lambda: layer(*args, **kwargs))

    def behind_attention(self, run: Run, call: Call, *, made: Mapping[str, Any] | None = None) -> torch.Tensor:
        """The state that a layer makes without its mlp, past `__call__`, so that no hook of the user's fires twice.

        `made`: what its attention returned in this very call (`attention_noted`), which is then not computed again.
        """
        layer, fact, (args, kwargs) = self.layer_of(run), self.facts[run.layer], call
        assert fact.parts is not None
        left_out = Exchange(layer, fact.parts.mlp, fact.returns, self._lent(run), lender=self._tied_to(run))
        with left_out.in_place(), replayed(layer, made or {}):
            found: torch.Tensor = first_state(layer.forward(*args, **kwargs))
        return found

    @contextmanager
    def attention_noted(self, run: Run, made: dict[str, Any]) -> Iterator[None]:
        """Meanwhile what the attention of the layer returns is put into `made`, by the child's name."""
        layer, parts = self.layer_of(run), self.facts[run.layer].parts
        assert parts is not None
        handles = [
            layer.get_submodule(name).register_forward_hook(partial(_note, made, name)) for name in parts.attention
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def map(self, step: Map, hidden: torch.Tensor) -> torch.Tensor:
        """What a fitted map makes of the state."""
        found = self._maps.get(step.weights)
        if found is None:
            found = self._maps[step.weights] = FittedMap(TensorsOf(step.weights, self.tensors))
        return found(hidden)

    def _exchange(self, run: Run) -> Exchange:
        """What `run` changes in its layer for the length of one call."""
        key, layer = (run.layer, run.part, run.weights, run.tie, run.layer_sources), self.layer_of(run)
        found = self._exchanges.get(key)
        if found is not None and found.layer is not layer:
            found = None
        if not run.own_tensors and (found is None or not found.is_prepared()):
            self._refuse_sharded(run)
        if found is None:
            fact = self.facts[run.layer]
            left_out: tuple[str, ...] = ()
            if run.part != "layer":
                assert fact.parts is not None  # check P105
                left_out = fact.parts.mlp if run.part == "attention" else fact.parts.attention
            found = self._exchanges[key] = Exchange(
                layer, left_out, fact.returns, self._lent(run), self._unused(run), self._tied_to(run)
            )
        return found

    def _unused(self, run: Run) -> Mapping[str, int]:
        """The modules that make nothing but what the run takes from another layer, with the last dimension of what they
        answer."""
        roles = self.facts[run.layer].roles
        if not run.layer_sources or run.part == "mlp" or roles is None:
            return {}
        return {name: roles.widths[name] for name in roles.unused(run.unmade)}

    def _lends(self, run: Run) -> bool:
        """Whether tensors of the plan stand in the base layer while it is called for `run`."""
        return bool(run.ids) and (self.modules is None or self.modules.layer(run.weights) is None)

    def _lent(self, run: Run) -> Mapping[str, torch.Tensor]:
        """These tensors and those of the layer that it is tied to, by their names in the layer."""
        ids = reversed(run.ids) if self._lends(run) else ()
        held: list[Any] = [TensorsOf(weights_id, self.tensors) for weights_id in ids]
        if (other := self._tied_to(run)) is not None:
            held.append(TiedTensors(self.layer_of(run), other, across=run.tied_layer is None))
        return held[0] if len(held) == 1 else ChainMap(*held)

    def _refuse_sharded(self, run: Run) -> None:
        """Raise P153 where tensors would be lent to, or by, a layer that is spread over processes."""
        if self._lends(run):
            refuse_sharded(self.layer_of(run), run)
        if (other := self._tied_to(run)) is not None:
            refuse_sharded(self.layer(run.layer), run)
            refuse_sharded(other, run)

    def _tied_to(self, run: Run) -> Any:
        """The layer whose matrices the run has; None: no other's."""
        match run.tied_to:
            case None:
                return None
            case int():
                return self.layer(run.tied_to)
            case StackLayer():
                return self.planned.real(run.tied_to.layer, run.tied_to.stack)
            case _:
                assert_never(run.tied_to)
