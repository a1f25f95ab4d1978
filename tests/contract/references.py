"""What each kind of plan must compute, said without the executor: the stock layers called by hand, no cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from shoal.models.opened import open_model
from shoal.models.stacks import find_stack

Batch = dict[str, torch.Tensor]
Call = Callable[[int, torch.Tensor], torch.Tensor]

CLOSE = {"atol": 3e-5, "rtol": 3e-5}
"""Of logits that two ways of computing give: more than ten times what they differed by under any kernels and number of
threads that were tried."""


@torch.no_grad()
def by_hand(model: PreTrainedModel, batch: Batch, chain: Callable[[Call, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Logits [b, t, vocab] when the stack computes `chain(call, h)`.

    A first stock pass records the arguments of every layer. `call(i, h)` runs stock layer i on h with them. A second
    stock pass has the last layer's output replaced by the chain's result, so that norm and head are the model's own.
    """
    stack = find_stack(model)
    layers = [stack.layer(i) for i in range(stack.depth)]
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(index: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(index, (args, dict(kwargs)))

        return layers[index].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [record(i) for i in range(len(layers))]
    try:
        model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

    def call(index: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = calls[index]
        out = (
            layers[index](hidden, *args[1:], **kwargs) if args else layers[index](**kwargs | {"hidden_states": hidden})
        )
        return out[0] if isinstance(out, tuple) else out

    first_args, first_kwargs = calls[0]
    result = chain(call, first_args[0] if first_args else first_kwargs["hidden_states"])

    def replace(_: nn.Module, args: Any, out: Any) -> Any:
        return (result, *out[1:]) if isinstance(out, tuple) else result

    handle = layers[-1].register_forward_hook(replace)
    try:
        return model(**batch, use_cache=False).logits
    finally:
        handle.remove()


@contextmanager
def silenced(model: PreTrainedModel, index: int, part: str) -> Iterator[None]:
    """The named part of layer `index` adds nothing, because every tensor that it owns is zero meanwhile."""
    stack = find_stack(model)
    parts = open_model(model).facts(stack.name).layers[index].parts
    assert parts is not None
    owned = [p for name in getattr(parts, part) for p in stack.layer(index).get_submodule(name).parameters()]
    saved = [p.detach().clone() for p in owned]
    try:
        for parameter in owned:
            parameter.data.zero_()
        yield
    finally:
        for parameter, value in zip(owned, saved, strict=True):
            parameter.data.copy_(value)


@contextmanager
def tied(model: PreTrainedModel, index: int, other: int) -> Iterator[None]:
    """Every parameter of two and more dimensions of layer `index` has the values of that of layer `other`."""
    layer, source = (dict(find_stack(model).layer(i).named_parameters()) for i in (index, other))
    saved = {name: p.detach().clone() for name, p in layer.items() if p.dim() > 1}
    assert saved and all(name in source for name in saved)
    try:
        for name in saved:
            layer[name].data.copy_(source[name].data)
        yield
    finally:
        for name, value in saved.items():
            layer[name].data.copy_(value)


@torch.no_grad()
def shared_kv(model: PreTrainedModel, batch: Batch, source: int, reader: int, halves: str = "kv") -> torch.Tensor:
    """Logits of one pass in which layer `reader` attends to layer `source`'s keys and values, or to one of the two."""
    stack, cache = find_stack(model), _SharingCache(source, reader, halves)

    def give(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return _with_cache(args, kwargs, cache)

    handles = [stack.layer(i).register_forward_pre_hook(give, with_kwargs=True) for i in (source, reader)]
    try:
        return model(**batch, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


class _SharingCache(Cache):
    def __init__(self, source: int, reader: int, halves: str) -> None:
        super().__init__(layers=[])
        self.source, self.reader, self.halves = source, reader, halves
        self.states: Any = None

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> Any:
        if layer_idx == self.source:
            self.states = (key_states, value_states)
        own = (key_states, value_states)
        if layer_idx != self.reader:
            return own
        return tuple(self.states[at] if half in self.halves else own[at] for at, half in enumerate("kv"))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@torch.no_grad()
def with_map_of(model: PreTrainedModel, batch: Batch, source: int, follower: int) -> torch.Tensor:
    """Logits of a model with eager attention in which layer `follower` weighs its values with the map of `source`."""
    stack = find_stack(model)
    homes = {sys.modules[type(m).__module__] for m in stack.layer(source).modules()}
    home = next((one for one in homes if hasattr(one, "eager_attention_forward")), sys)
    eager: Any = home.eager_attention_forward
    inside = {id(m): index for index in (source, follower) for m in stack.layer(index).modules()}
    maps: list[torch.Tensor] = []

    def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if inside.get(id(module)) == follower:
            values = torch.repeat_interleave(value, maps[0].shape[1] // value.shape[1], 1)
            return (maps[0] @ values).transpose(1, 2).contiguous(), maps[0]
        out, weights = eager(module, query, key, value, *args, **kwargs)
        if inside.get(id(module)) == source:
            maps.append(weights)
        return out, weights

    home.eager_attention_forward = attend  # type: ignore[attr-defined]
    try:
        return model(**batch, use_cache=False).logits
    finally:
        home.eager_attention_forward = eager  # type: ignore[attr-defined]


@torch.no_grad()
def later_kv(model: PreTrainedModel, batch: Batch, source: int, reader: int) -> torch.Tensor:
    """Logits of a model with eager attention, token after token, in which layer `reader` attends to what the later
    layer `source` made of the tokens before.

    For each token one pass without a cache over the text so far; the reader is given the keys and values that `source`
    had made of the earlier tokens when these were the last ones, and in front an empty entry for tokens that see none.
    """
    stack, made, rows = find_stack(model), _Made(), list[torch.Tensor]()

    def of_source(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return _with_cache(args, kwargs, _GivenCache(made.note))

    def of_reader(_: nn.Module, args: Any, kwargs: Any) -> Any:
        args, kwargs = _with_cache(args, kwargs, _GivenCache(made.before))
        return tuple(_shifted(one) for one in args), {name: _shifted(one) for name, one in kwargs.items()}

    hooks = [(source, of_source), (reader, of_reader)]
    handles = [stack.layer(i).register_forward_pre_hook(hook, with_kwargs=True) for i, hook in hooks]
    try:
        for end in range(1, batch["input_ids"].shape[1] + 1):
            made.end = end
            rows.append(model(**{name: one[:, :end] for name, one in batch.items()}, use_cache=False).logits[:, -1:])
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(rows, 1)


class _Made:
    """Keys and values by token, each as the source made them when that token was the last."""

    def __init__(self) -> None:
        self.end, self.known = 0, list[Any]()

    def note(self, keys: torch.Tensor, values: torch.Tensor) -> Any:
        assert len(self.known) == self.end - 1
        self.known.append((keys[:, :, -1:], values[:, :, -1:]))
        return keys, values

    def before(self, keys: torch.Tensor, values: torch.Tensor) -> Any:
        """An empty entry, those of the tokens before, and one for the last token, whose own are not made yet."""
        empty = [[torch.zeros_like(one[:, :, :1])] for one in (keys, values)]
        return tuple(torch.cat([*e, *(both[at] for both in self.known), *e], 2) for at, e in enumerate(empty))


class _GivenCache(Cache):
    """Answers each update with what a function makes of it."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__(layers=[])
        self.answer = answer

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> Any:
        return self.answer(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def _with_cache(args: Any, kwargs: Any, cache: Cache) -> tuple[Any, Any]:
    for name in ("past_key_values", "layer_past"):
        if name in kwargs:
            return args, kwargs | {name: cache}
    return (args[0], cache, *args[2:]), kwargs  # GPT-2 passes the cache second


def _shifted(mask: Any) -> Any:
    """An additive mask in which no token sees itself, with the empty entry in front for those that see nothing."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[-1] != mask.shape[-2]:
        return mask
    least = torch.finfo(mask.dtype).min
    others = torch.full_like(mask, least).triu() + mask.clamp_min(least / 4).tril(-1)
    blind = (others < least / 8).all(-1, keepdim=True)
    return torch.cat([torch.where(blind, 0.0, least), others], -1)
