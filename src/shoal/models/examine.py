"""One forward of one token, watched: what each layer is called with, what it returns, what it keeps in the cache."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from shoal.errors import ModelError
from shoal.models.evaluating import evaluating
from shoal.models.inputs import sample_inputs
from shoal.models.kinds import MEDIA, PICTURES, auto_of, is_causal
from shoal.models.listening import Call, without_cache, without_values
from shoal.models.lists import Stack
from shoal.models.neurons import find_neurons
from shoal.models.parts import INDEX_NAMES, Parts, built_alike, find_parts, reads_attention, without
from shoal.models.roles import HeadRoles, find_roles
from shoal.plan.spec import NeuronSpec


@dataclass
class LayerFacts:
    """What one forward showed of one layer."""

    row: int
    """The cache row that the layer itself writes to."""
    tail: int
    """How many values the layer returns besides the hidden state in a tuple or list; -1 for a bare tensor."""
    cache_at: str | int | None
    """The keyword or the position at which the layer is given the cache; None when it gets none."""
    keys: tuple[int, ...] | None = None
    values: tuple[int, ...] | None = None
    window: int | None = None
    state: int = 0
    parts: Parts | None = None
    carried: dict[str | int, int] = field(default_factory=dict)
    """{keyword or position of an argument: which value that the layer before returned besides the hidden state}."""
    returns: dict[str, int] = field(default_factory=dict)
    """For each child of `parts`: values returned besides its tensor, -1 for a bare tensor."""
    roles: HeadRoles | None = None
    """What the matrices of its attention make; None without keys and values, and where that cannot be told."""
    mlp_reads_attention: bool = False
    """Whether its mlp reads what its attention wrote; otherwise both read one input, or nobody knows."""
    neurons: NeuronSpec | None = None
    """The neurons of its mlp, also where its parts are not known apart."""
    called: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    """What it was called with: tensors without their values, and no cache."""


@dataclass
class StackFacts:
    """What is known of all layers of one stack."""

    layers: list[LayerFacts]
    forward: bool
    """False when the forward could not run (as some do on the meta device) and only the structure was read."""
    parts_note: str | None = None
    """Why the layers have no separate attention and mlp, if they have none."""


def examine(model: PreTrainedModel, stack: Stack) -> StackFacts:
    """Run `model` on one token and see what its layers do. Raises M305 when the loop calls layers in an order of its
    own (twice, or not at all), which no plan could replace."""
    layers = [stack.layer(i) for i in range(stack.depth)]
    watcher = _Watcher(layers, by_name=stack.name != "decoder")
    place = _place(model)
    try:
        with evaluating(model), watcher:
            out = model(**_arguments(model, stack, place))
            _require_order(model, watcher.order, len(layers))
            if stack.name == "decoder":
                _read_cache(_cache_of(out), watcher.facts)
                _find_roles(layers, watcher)
            _find_neurons(layers, watcher)
            note = _prove_parts(layers, watcher)
            forward = True
    except ModelError:
        raise
    except Exception as error:  # odd numbers in a config raise whatever the arithmetic with them raises
        if place.type != "meta" or not _for_want_of_values(model, error):
            raise ModelError(_not_probed(model, error), code="M305") from error
        known = [None if watcher.by_name else find_parts(layer) for layer in layers]
        watcher.facts = [LayerFacts(_own_row(layer, i), -1, None, parts=known[i]) for i, layer in enumerate(layers)]
        note, forward = None, False
    return StackFacts(watcher.facts, forward, note)


def _require_order(model: PreTrainedModel, order: list[int], depth: int) -> None:
    if order != list(range(depth)):
        raise ModelError(
            f"{type(model).__name__} calls its layers in the order {order[:12]}; a plan needs each once and in order",
            code="M305",
        )


def _for_want_of_values(model: PreTrainedModel, error: Exception) -> bool:
    """Whether a forward on the meta device may have failed because tensors have no values there, or because it was
    given embeddings in place of ids; any other error is the config's, on every device. Of models that read pictures
    nothing can be told."""
    if auto_of(model) in (PICTURES, MEDIA) or isinstance(error, NotImplementedError | AttributeError):
        return True
    return isinstance(error, RuntimeError) and "meta" in str(error)


def _not_probed(model: PreTrainedModel, error: Exception) -> str:
    """That a family is not supported: what its forward said of a sample is no fault of the user's."""
    given = "a token of text alone" if is_causal(model) else "the sample that Shoal makes"
    why = " ".join(str(error).split())[:200]
    return (
        f"{type(model).__name__} does not run on {given} ({why}), so what its layers do cannot be found out; models of "
        "this class cannot be planned yet"
    )


def _place(model: PreTrainedModel) -> torch.device:
    """Where the forward runs: accelerate keeps offloaded weights on meta, and its hooks know where they are used."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # text and vision have no embeddings in common
        weight = None
    if not isinstance(weight, torch.Tensor):
        weight = next(model.parameters())
    if not weight.is_meta:
        return weight.device
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    found = [getattr(one, "execution_device", None) for hook in hooks for one in getattr(hook, "hooks", (hook,))]
    return torch.device(next((device for device in found if device is not None), "meta"))


def _arguments(model: PreTrainedModel, stack: Stack, place: torch.device) -> dict[str, Any]:
    """What the model is called with: one token, or what it reads instead."""
    if is_causal(model):
        return {**_one_token(model, place), "use_cache": True}
    inputs: dict[str, Any] = {**sample_inputs(model, place)}
    return inputs | ({"use_cache": True} if stack.name == "decoder" else {})


def _one_token(model: PreTrainedModel, place: torch.device) -> dict[str, torch.Tensor]:
    """A mask keeps transformers from warning about padding; on the meta device both mask and ids would be read."""
    if place.type == "meta":
        embeddings = model.get_input_embeddings().weight
        return {"inputs_embeds": embeddings.new_zeros((1, 1, embeddings.shape[-1]))}
    token = torch.zeros((1, 1), dtype=torch.long, device=place)
    return {"input_ids": token, "attention_mask": torch.ones_like(token)}


class _Watcher:
    """Hooks on every layer and on the children of its parts for one forward."""

    def __init__(self, layers: list[nn.Module], by_name: bool) -> None:
        self.layers, self.by_name = layers, by_name
        self.order: list[int] = []
        self.facts: list[LayerFacts] = []
        self.calls: list[Call] = []
        self._returns: dict[int, dict[str, int]] = {i: {} for i in range(len(layers))}
        self._tail: list[Any] = []

    def __enter__(self) -> _Watcher:
        self._handles = []
        for index, layer in enumerate(self.layers):
            self._handles.append(layer.register_forward_hook(self._on_layer(index), with_kwargs=True))
            parts = find_parts(layer, self.by_name)
            for name in (*parts.attention, *parts.mlp) if parts else ():
                child = layer.get_submodule(name)
                self._handles.append(child.register_forward_hook(self._on_child(index, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _on_layer(self, index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            self.order.append(index)
            if index != len(self.facts):
                return
            given: list[tuple[str | int, Any]] = [*kwargs.items(), *enumerate(args)]
            caches = [at for at, value in given if isinstance(value, Cache)]
            before, self._tail = self._tail, list(out[1:]) if isinstance(out, tuple | list) else []
            self.facts.append(
                LayerFacts(
                    _own_row(layer, index),
                    len(self._tail) if isinstance(out, tuple | list) else -1,
                    next(iter(caches), None),
                    parts=find_parts(layer, self.by_name),
                    carried={
                        at: n
                        for at, value in given
                        for n, v in enumerate(before)
                        if isinstance(v, torch.Tensor) and v is value
                    },
                    returns=self._returns[index],
                    called=(without_values(args), without_values(kwargs)),
                )
            )
            self.calls.append((args, kwargs))

        return hook

    def _on_child(self, index: int, name: str) -> Any:
        def hook(child: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self._returns[index][name] = len(out) - 1 if isinstance(out, tuple | list) else -1

        return hook


def _own_row(layer: nn.Module, index: int) -> int:
    found = (module.__dict__.get(name) for module in layer.modules() for name in INDEX_NAMES)
    return next((place for place in found if isinstance(place, int)), index)


def _cache_of(out: Any) -> Cache | None:
    found = (out.get(name) for name in ("past_key_values", "cache_params"))
    cache = next((c for c in found if isinstance(c, Cache)), None)
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def _read_cache(cache: Cache | None, facts: list[LayerFacts]) -> None:
    rows = cache.layers if cache is not None else []
    for fact in facts:
        if fact.row >= len(rows):
            continue
        row = rows[fact.row]
        if isinstance(getattr(row, "keys", None), torch.Tensor):
            fact.keys, fact.values = tuple(row.keys.shape), tuple(row.values.shape)
            fact.window = row.sliding_window if getattr(row, "is_sliding", False) else None
        fact.state = sum(
            t.numel() for name in ("conv_states", "recurrent_states") for t in tensors(getattr(row, name, None))
        )


def _find_roles(layers: list[nn.Module], watcher: _Watcher) -> None:
    """Of layers with keys and values, once for all that are built alike."""
    known: dict[Hashable, HeadRoles | None] = {}
    for layer, fact, call in zip(layers, watcher.facts, watcher.calls, strict=True):
        if fact.keys is None:
            continue
        key = (built_alike(layer), fact.cache_at)
        if key not in known:
            known[key] = find_roles(layer, fact.cache_at, call)
        fact.roles = known[key]


def _find_neurons(layers: list[nn.Module], watcher: _Watcher) -> None:
    """Of layers with an mlp, once for all that are built alike."""
    known: dict[Hashable, NeuronSpec | None] = {}
    for layer, fact, call in zip(layers, watcher.facts, watcher.calls, strict=True):
        if fact.parts is not None:
            key = built_alike(layer)
            if key not in known:
                known[key] = find_neurons(layer, fact.parts, fact.returns, without_cache(call))
            fact.neurons = known[key]


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a tensor, a list or a dict; None holds none."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, list | tuple) else []


def _prove_parts(layers: list[nn.Module], watcher: _Watcher) -> str | None:
    """With attention and mlp both stubbed a layer must hand its input on, bit for bit, or it has no parts."""
    note = None
    for index, (layer, fact, call) in enumerate(zip(layers, watcher.facts, watcher.calls, strict=True)):
        if fact.parts is None:
            continue
        if watcher.by_name and any(p.is_meta for p in layer.parameters()):
            fact.parts = None  # many encoders norm the sum, which only values show
            note = note or "without weights nothing proves that a layer only adds its attention and its mlp"
            continue
        args, kwargs = without_cache(call)
        x: Any = args[0] if args else kwargs["hidden_states"]
        try:
            with without(layer, (*fact.parts.attention, *fact.parts.mlp), fact.returns):
                out = layer(*args, **kwargs)
            same = x.device.type == "meta" or torch.equal(out[0] if isinstance(out, tuple) else out, x)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError):
            same = False
        with suppress(RuntimeError, TypeError, ValueError, AttributeError, KeyError):
            fact.mlp_reads_attention = same and reads_attention(layer, fact.parts, fact.returns, args, kwargs)
        if not same:
            fact.parts = None
            note = note or f"layer {index} ({type(layer).__name__}) does more than add its attention and its mlp"
    return note
