"""Calling a layer for its keys and values alone, without what it does once they are stored.

What a layer calls only after it has handed its keys and values to the cache cannot change them. These modules are found
by watching one call. While they and the attention function are replaced, the layer computes its keys and values and
little else; a second call proves that they are the same, bit for bit.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from shoal.executing.calls import Call, hidden_of, with_argument
from shoal.executing.slots import KeysValues, PassingCache, Store, slot_view
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.models.examine import LayerFacts
from shoal.models.opened import OpenedModel

_TOKENS = 3


class _NoAttention:
    """Answers with zeros [batch, tokens, attention heads, dim of a value] that take no memory."""

    asked = 0
    """How often; a layer that works its attention out itself never asks."""

    def __call__(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        self.asked += 1
        shape = query.shape[0], query.shape[2], query.shape[1], value.shape[-1]
        return query.new_zeros(()).expand(shape), None


ATTENTION = "shoal_none"
"""Under this name transformers knows the attention function that attends to nothing."""
NO_ATTENTION = _NoAttention()
AttentionInterface.register(ATTENTION, NO_ATTENTION)


@dataclass(frozen=True)
class Returned:
    """The form of what a module returns."""

    size: int
    """The last dimension of its (first) tensor."""
    flat: bool
    """[batch * tokens, size] in place of [batch, tokens, size]."""
    extra: int
    """How many values stand beside the tensor; -1 for a bare tensor."""

    def zeros(self, hidden: torch.Tensor) -> Any:
        """Zeros of this form, which take no memory, for a layer that is called with `hidden`."""
        rows, tokens = hidden.shape[-3:-1]
        shape = (rows * tokens, self.size) if self.flat else (rows, tokens, self.size)
        out = hidden.new_zeros(()).expand(shape)
        return out if self.extra < 0 else (out, *[None] * self.extra)


class KVProjection:
    """What of one layer is left out when only its keys and values are wanted: `with projection.of(hidden)`."""

    def __init__(
        self, layer: nn.Module, idle: dict[str, Returned], around: tuple[str, ...], attending: tuple[str, ...]
    ) -> None:
        """`idle`: modules that the keys and values do not depend on, and what they return. `around`: those that are
        under way while keys and values are stored, the layer itself ("") among them; hooks behind them hear nothing,
        since what they hand on is not what they make. `attending`: those that look the attention function up in their
        config."""
        self.layer, self.idle = layer, idle
        self._swaps: list[_Swap] = []
        for name, form in idle.items():
            parent, _, leaf = name.rpartition(".")
            self._swaps.append(_IdleModule(layer.get_submodule(parent)._modules, leaf, form))
        self._swaps += [_NoHooks(layer.get_submodule(name).__dict__, "_forward_hooks") for name in around]
        self._swaps += [_QuietConfig(layer.get_submodule(name).__dict__, "config") for name in attending]
        self._form: tuple[Any, ...] = ()

    def of(self, hidden: torch.Tensor) -> KVProjection:
        """For a call of the layer with the state `hidden`."""
        form = hidden.shape[-3:-1], hidden.dtype, hidden.device
        if form != self._form:  # every step of a decode has the same
            self._form = form
            for swap in self._swaps:
                swap.prepare(hidden)
        return self

    def __enter__(self) -> None:
        """From now on the layer computes its keys and values; its answer means nothing. The cache that it is given
        decides what becomes of them."""
        for swap in self._swaps:
            swap.enter()

    def __exit__(self, *_: object) -> None:
        for swap in self._swaps:
            swap.leave()


class _Swap:
    """A value in a dictionary of a module that another one stands for."""

    def __init__(self, place: dict[str, Any], name: str) -> None:
        self.place, self.name = place, name
        self.own: Any = None
        self.other: Any = None

    def prepare(self, hidden: torch.Tensor) -> None:
        """The next calls of the layer are with states like this."""

    def enter(self) -> None:
        own = self.place[self.name]
        if own is not self.own:  # the first time, or somebody has exchanged it: adapters, another attention
            self.own, self.other = own, self.made(own)
        self.place[self.name] = self.other

    def leave(self) -> None:
        self.place[self.name] = self.own

    def made(self, own: Any) -> Any:
        """What stands for `own`."""
        raise NotImplementedError


class _NoHooks(_Swap):
    def made(self, own: Any) -> Any:
        return OrderedDict()


class _QuietConfig(_Swap):
    def made(self, own: Any) -> Any:
        quiet = copy.copy(own)
        quiet._attn_implementation_internal = ATTENTION
        return quiet


class _IdleModule(_Swap):
    def __init__(self, place: dict[str, Any], name: str, form: Returned) -> None:
        super().__init__(place, name)
        self.form = form
        self.answer: list[Any] = [None]

    def prepare(self, hidden: torch.Tensor) -> None:
        self.answer[0] = self.form.zeros(hidden)

    def made(self, own: Any) -> Any:
        return _Idle(own, self.answer)


class _Idle(nn.Module):
    """Stands for a module whose answer nobody wants. Its parameters are still found under their names."""

    def __init__(self, module: nn.Module, answer: list[Any]) -> None:
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules"):
            self.__dict__[name] = module.__dict__[name]
        self.__dict__.update(_module=module, _answer=answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.__dict__["_answer"][0]


def store_alone(store: Store, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
    """Put keys and values into the row, and hand back these alone: no attention will look at them."""
    store(keys, values)
    return keys, values


def projections_of(opened: OpenedModel) -> list[KVProjection | None]:
    """For each layer of the decoder how to call it for its keys and values alone; None where that could not be proved.

    Runs the model, which must be whole, on a few tokens, once.
    """
    stack = opened.stack()
    layers = [stack.layer(index) for index in range(stack.depth)]
    facts = opened.facts(stack.name).layers
    return opened.remember("KV projections", lambda: _find_all(opened.model, layers, facts))


def _find_all(model: Any, layers: list[nn.Module], facts: list[LayerFacts]) -> list[KVProjection | None]:
    found: list[KVProjection | None] = [None] * len(layers)

    def look(index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            handles[index].remove()  # the layer is called again in here
            found[index] = _find(layer, facts[index], (args, kwargs))

        return hook

    handles = [layer.register_forward_pre_hook(look(i), with_kwargs=True) for i, layer in enumerate(layers)]
    ids = torch.zeros((1, _TOKENS), dtype=torch.long, device=device_of(model))
    try:
        with evaluating(model):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _find(layer: nn.Module, fact: LayerFacts, call: Call) -> KVProjection | None:
    if fact.cache_at is None or fact.keys is None:
        return None
    hidden = hidden_of(call)
    stored: list[KeysValues] = []
    again: list[KeysValues] = []
    try:
        made = _watched(layer, fact, call, stored)
        if made is None or len(stored) != 1:
            return None
        asked = NO_ATTENTION.asked
        with made.of(hidden):
            _call(layer, fact, call, again)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return None
    if NO_ATTENTION.asked == asked or len(again) != 1:
        return None  # it would attend to a cache of any length
    return made if all(torch.equal(a, b) for a, b in zip(stored[0], again[0], strict=True)) else None


def _watched(layer: nn.Module, fact: LayerFacts, call: Call, stored: list[KeysValues]) -> KVProjection | None:
    """Call the layer, note what it stores, and find which of its modules run only after that."""
    before: set[str] = set()
    under_way: list[str] = []
    around: list[str] = []
    after: dict[str, Returned] = {}
    handles = []

    def begins(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            under_way.append(name)
            if not stored:
                before.add(name)

        return hook

    def ends(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            under_way.remove(name)
            form = _form(out)
            if name not in before and form is not None:
                after[name] = form

        return hook

    for name, module in layer.named_modules():
        handles += [module.register_forward_pre_hook(begins(name)), module.register_forward_hook(ends(name))]
    try:
        _call(layer, fact, call, stored, lambda: around.extend(under_way))
    finally:
        for handle in handles:
            handle.remove()
    # the uppermost ones: what is inside of one is not called either
    idle = {name: form for name, form in after.items() if not any(name.startswith(f"{other}.") for other in after)}
    attending = tuple(name for name in around if "config" in layer.get_submodule(name).__dict__)
    return KVProjection(layer, idle, tuple(around), attending) if around else None


def _form(out: Any) -> Returned | None:
    """The form of what a module returned for one sequence of a few tokens; None for any other than the two known."""
    first = out[0] if isinstance(out, tuple | list) else out
    if not isinstance(first, torch.Tensor) or first.shape[:-1] not in ((1, _TOKENS), (_TOKENS,)):
        return None
    return Returned(first.shape[-1], first.dim() == 2, len(out) - 1 if isinstance(out, tuple | list) else -1)


def _call(
    layer: nn.Module,
    fact: LayerFacts,
    call: Call,
    stored: list[KeysValues],
    note: Callable[[], None] = lambda: None,
) -> None:
    def take(_: Store, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        stored.append((keys.clone(), values.clone()))
        note()
        return keys, values

    assert fact.cache_at is not None
    args, kwargs = with_argument(call, fact.cache_at, slot_view(PassingCache(), 0, take=take))
    layer(*args, **kwargs)
