"""Equal layers as one body over stacked weights, so that compiling takes the time of one layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from shoal.decoding.fast_layers import RowCache
from shoal.errors import UsageError
from shoal.executing.calls import Place, cache_of, hidden_of, with_argument, with_hidden
from shoal.executing.layer_list import LayerProxyList
from shoal.graphs._graph import Graph, require_plain, swap
from shoal.models.describe import layer_kinds
from shoal.models.lists import Stack
from shoal.models.opened import open_model

KeysValues = tuple[torch.Tensor, torch.Tensor]
_PLACED = frozenset({"layer_idx", "layer_id", "layer_number"})
"""What a module may know of its place in the stack without computing otherwise there."""


def stack(model: nn.Module) -> Graph:
    """Run equal layers as one body over their stacked weights, so that torch.compile compiles one layer, not all.

    The parameters of the same name in all L layers are laid into one tensor [L, ...], of which each stays a view; no
    name changes and nothing is held twice. The first layer that the model's loop calls runs all of them: one body, the
    first layer's own forward, is called with the weights of layer 0, 1, .. in turn, the other calls hand the state on.
    Inside torch.compile the turn is torch's `scan`, outside of it a loop of Python. Without a cache, or with a dynamic
    one of full attention whose keys and values go in and out of the scan, stacked; with any other cache the layers
    run one after the other as before.

    It is made for `torch.compile(model)` inside the context; without compiling it only adds calls, and a cache is
    copied at every token. The body is the same code, so outside of torch.compile the bits are the same. Hooks on
    layers other than the first are not called.

    Raises `UsageError` U662 for a model whose layers are not equal in modules, shapes, settings and kind, that a plan
    is running on, or whose matrices are quantised, sharded, offloaded or wrapped by peft.

    Source: Koeplinger et al. 2024, "Kernel Looping: Eliminating Synchronization Boundaries for Peak Inference
    Performance", arXiv 2410.23668.

    How we differ: the paper loops one kernel on a dataflow machine, where nothing waits between two layers; this is
    the loop over one compiled body alone, and no speed of theirs is claimed.
    """
    require_plain(model, "stack")
    opened = open_model(model)
    found = opened.stack("decoder")
    if isinstance(found.layers, LayerProxyList):
        raise _refused("a plan is running, which calls the layers itself; take it away or leave out the graph")
    if found.depth < 2:
        raise _refused(f"a stack of {found.depth} layer has nothing to stack; leave it out")
    kinds = layer_kinds(found.config, found.depth)
    first = _described(found.layer(0))
    for index in range(1, found.depth):
        own = _described(found.layer(index))
        if kinds[index] != kinds[0] or own != first:
            what = next((path for path in first if own.get(path) != first[path]), "its kind of attention")
            raise _refused(f"layer {index} is not made as layer 0 is ({what}); leave it out")
    if any(fact.tail >= 0 or fact.carried for fact in opened.facts("decoder").layers):
        raise _refused("its layers hand on more than the hidden state; leave it out")
    return _Stacked(found)


def _refused(why: str) -> UsageError:
    return UsageError(f"--graph stack does not fit this model: {why}", code="U662")


def _described(layer: nn.Module) -> dict[str, Any]:
    """Modules, shapes and plain settings of a layer, by path."""
    found: dict[str, Any] = {name: (p.shape, p.dtype, p.device) for name, p in layer.named_parameters()}
    for path, module in layer.named_modules():
        simple = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str) and k not in _PLACED}
        found[f"{path}()"] = (type(module), simple, sorted(module._buffers))
    return found


class _Stacked(Graph):
    def __init__(self, found: Stack) -> None:
        super().__init__("stack", found.depth, {})
        self.stack = found
        self._before: nn.ModuleList | None = None
        self._config: AbstractContextManager[Any] | None = None

    def put(self) -> None:
        layers = [self.stack.layer(i) for i in range(self.stack.depth)]
        weights: dict[str, torch.Tensor] = {}
        for name, _ in layers[0].named_parameters():
            own = [layer.get_parameter(name) for layer in layers]
            weights[name] = torch.stack([p.data for p in own])
            for parameter, row in zip(own, weights[name], strict=True):
                swap(parameter, row)
        planned = LayerProxyList(self.stack)
        planned.attach(_Scan(layers, weights))
        self._before = self.stack.layers
        self.stack.owner._modules[self.stack.attr] = planned
        # without it the scan's counter, a tensor, cannot be made an index by the compiler
        self._config = torch._dynamo.config.patch(capture_scalar_outputs=True)
        self._config.__enter__()

    def take_away(self) -> None:
        if self._before is None:
            return
        if self._config is not None:
            self._config.__exit__(None, None, None)
        self.stack.owner._modules[self.stack.attr], self._before = self._before, None
        for parameter in self.stack.layers.parameters():
            swap(parameter, parameter.data.clone(memory_format=torch.contiguous_format))


class _Scan:
    """What the proxies of the layers call: all layers with the first, nothing with the others."""

    def __init__(self, layers: list[nn.Module], weights: dict[str, torch.Tensor]) -> None:
        self.layers, self.weights = layers, weights

    def layer(self, index: int) -> Any:
        """The real layer."""
        return self.layers[index]

    def proxy_call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = args, kwargs
        cache = cache_of(call)
        if not _is_scanned(cache):
            return self.layers[index](*args, **kwargs)
        if index:
            return hidden_of(call)
        if cache is None:
            return self._turn(lambda state, xs: (self._body(call, state, xs[0], None)[0], _nothing(state)), call, ())[0]
        given: list[tuple[Place, Any]] = [*kwargs.items(), *enumerate(args)]  # GPT-2 gives its cache second
        place = next(name for name, value in given if value is cache)
        past = () if not cache.get_seq_length() else (_stacked(cache, "keys"), _stacked(cache, "values"))

        def body(state: torch.Tensor, xs: Any) -> tuple[torch.Tensor, KeysValues]:
            row = _Row(*xs[1:])
            out, _ = self._body(call, state, xs[0], (place, RowCache(row)))
            assert row.new is not None
            return out, row.new

        out, (keys, values) = self._turn(body, call, past)
        for at in range(len(self.layers)):
            cache.update(keys[at], values[at], at)
        return out

    def _body(
        self, call: Any, state: torch.Tensor, weights: dict[str, torch.Tensor], cache: tuple[Place, Any] | None
    ) -> tuple[torch.Tensor, None]:
        """The first layer with the weights of another one."""
        args, kwargs = with_hidden(call, state) if cache is None else with_argument(with_hidden(call, state), *cache)
        return functional_call(self.layers[0], weights, args, kwargs), None

    def _turn(self, body: Callable[..., Any], call: Any, past: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Any]:
        """`body` over the layers: the last state, and what the body tells of each, stacked."""
        state, xs = hidden_of(call), (self.weights, *past)
        if torch.compiler.is_compiling():
            from torch._higher_order_ops.scan import scan

            found: tuple[torch.Tensor, Any] = scan(body, state, xs)
            return found
        told = []
        for at in range(len(self.layers)):
            own = ({name: w[at] for name, w in self.weights.items()}, *(p[at] for p in past))
            state, one = body(state, own)
            told.append(one)
        if not isinstance(told[0], tuple):
            return state, None
        return state, tuple(torch.stack(parts) for parts in zip(*told, strict=True))


def _nothing(state: torch.Tensor) -> torch.Tensor:
    """What a body tells that has nothing to tell: a scan wants a tensor."""
    return state[..., :1, :1].clone()


def _is_scanned(cache: Any) -> bool:
    """Whether keys and values of this cache can go in and out of a body."""
    if cache is None:
        return True
    kinds = {type(row).__name__ for row in cache.layers}
    return type(cache).__name__ == "DynamicCache" and kinds <= {"DynamicLayer"}


def _stacked(cache: Any, name: str) -> torch.Tensor:
    return torch.stack([getattr(row, name) for row in cache.layers])


class _Row:
    """One row of a cache whose keys and values are handed in, and out again, instead of being stored."""

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        self.keys, self.values = keys, values
        self.new: KeysValues | None = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> KeysValues:
        self.new = (keys.clone(), values.clone())
        if self.keys is None or self.values is None:
            return keys, values
        return torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[-2]
