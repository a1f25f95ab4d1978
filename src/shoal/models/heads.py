"""What the matrices of an attention make, found by disturbing each: queries, keys, values, or what the layer adds.

A layer is called on a few tokens with a cache that only listens and with an attention function that only listens; then
every module with a matrix is disturbed in turn, and what changes among queries, keys and values is its role. No name of
a module is known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.models.examine import LayerFacts
from shoal.models.opened import OpenedModel
from shoal.models.parts import INDEX_NAMES

KeysValues = tuple[torch.Tensor, torch.Tensor]
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call of a layer."""
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(queries, keys, values), each [batch, heads, tokens, dim], to the context [batch, tokens, heads, dim of a value]."""
NAME = "shoal_probe"
"""Under this name transformers knows the attention function that only listens."""
TOKENS = 3
_FAILS = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)


@dataclass(frozen=True, slots=True)
class HeadRoles:
    """The modules with matrices in one layer's attention, by what they make; names within the layer. One that makes
    several things (a fused `qkv`, the latent of keys and values) stands at each."""

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    output: tuple[str, ...]
    """Those behind the attention, and gates beside it: what changes the layer's answer alone."""

    @property
    def unread(self) -> tuple[str, ...]:
        """What a run that attends to another layer's keys and values need not call."""
        return tuple(dict.fromkeys(n for n in (*self.keys, *self.values) if n not in self.queries))

    @property
    def unweighed(self) -> tuple[str, ...]:
        """What a run that takes over an attention map need not call."""
        return tuple(dict.fromkeys(n for n in (*self.queries, *self.keys) if n not in self.values))


@dataclass
class Heard:
    """What one call of a layer showed."""

    stored: list[KeysValues] = field(default_factory=list)
    """What it handed to the cache."""
    asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Queries, keys and values of its attention function; empty where it works its attention out itself."""
    out: torch.Tensor | None = None
    """The hidden state that it made."""


def roles_of(opened: OpenedModel, stack: str | None = None) -> list[HeadRoles | None]:
    """For each layer of a stack the roles of its attention's matrices; None for a layer without keys and values in a
    cache, and where that cannot be probed: on the meta device, beside cross-attention.

    Where a layer works its attention out itself nobody is told of queries: what it calls before it stores, and what
    changes its answer although keys and values stay, makes them. Runs the model, which must be whole, on a few tokens,
    once.
    """
    name = opened.stack(stack).name
    return opened.remember(f"head roles of {name}", lambda: _find_roles(opened, name))


def sample_calls(opened: OpenedModel, stack: str | None = None) -> list[Call]:
    """What each layer is called with for a sequence of `TOKENS` different tokens. Raises what the model raises."""
    found = opened.stack(stack)
    calls: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    handles = [found.layer(i).register_forward_pre_hook(hook, with_kwargs=True) for i in range(found.depth)]
    ids = torch.arange(1, TOKENS + 1, device=device_of(opened.model))[None]
    try:
        with evaluating(opened.model):
            opened.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def heard(
    layer: nn.Module,
    fact: LayerFacts,
    call: Call,
    *,
    given: KeysValues | None = None,
    attend: Attend | None = None,
    into: Heard | None = None,
) -> Heard:
    """Call `layer` over a cache that notes what is stored and hands back these, or the `given` keys and values.

    `attend`: the attention function meanwhile, in place of the model's own; it must have asked through transformers'
    interface. `into`: what is filled while the layer runs. Raises what the layer raises.
    """
    seen = Heard() if into is None else into

    def note(keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        seen.stored.append((keys.clone(), values.clone()))
        return given or (keys, values)

    def listen(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        seen.asked.append((queries.clone(), keys.clone(), values.clone()))
        return (attend or no_context)(queries, keys, values)

    args, kwargs = call
    place = fact.cache_at
    if isinstance(place, int):
        args = (*args[:place], _Listening(note), *args[place + 1 :])
    elif place is not None:
        kwargs = kwargs | {place: _Listening(note)}
    if attend is None:
        out = layer(*args, **kwargs)
    else:
        with _asking(layer, listen):
            out = layer(*args, **kwargs)
    seen.out = out[0] if isinstance(out, tuple | list) else out
    return seen


def _find_roles(opened: OpenedModel, name: str) -> list[HeadRoles | None]:
    stack, facts = opened.stack(name), opened.facts(name).layers
    if name != "decoder" or any(p.is_meta for p in opened.model.parameters()):
        return [None] * stack.depth
    try:
        calls = sample_calls(opened, name)
    except _FAILS:
        return [None] * stack.depth
    with evaluating(opened.model):
        return [_roles(stack.layer(i), facts[i], call) for i, call in enumerate(calls)]


def _roles(layer: nn.Module, fact: LayerFacts, call: Call) -> HeadRoles | None:
    if fact.cache_at is None or fact.keys is None:
        return None
    inside = list(_matrices(layer))
    try:
        early, whole, fixed = _order(layer, fact, call, inside)
        found: dict[str, list[str]] = {"q": [], "k": [], "v": [], "o": []}
        for name in inside:
            for role in _changes(layer, fact, call, name, whole, fixed, name in early) or "o":
                found[role].append(name)
    except _FAILS:
        return None
    return HeadRoles(*(tuple(names) for names in found.values()))


def _matrices(layer: nn.Module) -> Iterator[str]:
    """The modules with matrices of their own within the child that knows its place."""
    for name, child in layer.named_children():
        if any(index in one.__dict__ for one in child.modules() for index in INDEX_NAMES):
            for inner, module in child.named_modules(prefix=name):
                if any(p is not None and p.dim() >= 2 for p in module._parameters.values()):
                    yield inner


def _order(layer: nn.Module, fact: LayerFacts, call: Call, inside: list[str]) -> tuple[set[str], Heard, Heard]:
    """Which modules begin before keys and values are stored; the call over an attention that listens, and the layer's
    answer to these keys and values as it is."""
    early: set[str] = set()
    seen = Heard()
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(lambda *_, n=name: None if seen.stored else early.add(n))
        for name in inside
    ]
    try:
        heard(layer, fact, call, into=seen)
    finally:
        for handle in handles:
            handle.remove()
    whole = heard(layer, fact, call, attend=no_context)
    if len(whole.stored) != 1:
        raise RuntimeError("keys and values are not stored once")
    return early, whole, heard(layer, fact, call, given=whole.stored[0])


def _changes(layer: nn.Module, fact: LayerFacts, call: Call, name: str, whole: Heard, fixed: Heard, early: bool) -> str:
    """What is another when the module `name` is disturbed, of q, k and v."""
    with _disturbed(layer.get_submodule(name)):
        seen = heard(layer, fact, call, attend=no_context)
        keys, values = (not torch.equal(a, b) for a, b in zip(seen.stored[0], whole.stored[0], strict=True))
        if whole.asked:
            queries = not torch.equal(seen.asked[0][0], whole.asked[0][0])
        else:
            again = heard(layer, fact, call, given=whole.stored[0])
            assert again.out is not None
            assert fixed.out is not None
            queries = early and not torch.equal(again.out, fixed.out)
    return "q" * queries + "k" * keys + "v" * values


@contextmanager
def _disturbed(module: nn.Module) -> Iterator[None]:
    """Meanwhile the module answers something else; zeros would not show in one that gives zeros already."""

    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple | list) else out
        generator = torch.Generator().manual_seed(1)
        other = first + torch.randn(first.shape, generator=generator).to(first)
        return (other, *out[1:]) if isinstance(out, tuple | list) else other

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def no_context(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Zeros in the shape of what an attention function answers."""
    return values.new_zeros(queries.shape[0], queries.shape[2], queries.shape[1], values.shape[-1])


class _Listening(Cache):
    """A cache that holds nothing and asks a function what is to be attended to."""

    def __init__(self, note: Callable[[torch.Tensor, torch.Tensor], KeysValues]) -> None:
        super().__init__(layers=[])
        self.note = note

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> KeysValues:
        return self.note(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@contextmanager
def _asking(layer: nn.Module, attend: Attend) -> Iterator[None]:
    """Meanwhile the layer asks transformers for an attention function of ours."""
    saved: list[tuple[dict[str, Any], Any]] = []
    for module in layer.modules():
        own = module.__dict__.get("config")
        if own is not None and hasattr(own, "_attn_implementation_internal"):
            other = copy.copy(own)
            other.__dict__.update(_attn_implementation_internal=NAME, _shoal_probe=attend)
            saved.append((module.__dict__, own))
            module.__dict__["config"] = other
    try:
        yield
    finally:
        for place, own in saved:
            place["config"] = own


def _called(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    return module.config._shoal_probe(query, key, value), None


AttentionInterface.register(NAME, _called)
