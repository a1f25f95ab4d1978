"""The executor's side of the KV cache: rows in the plan's order, and a view that sends a layer to its row.

Invariant: after every forward all rows that the plan uses have the same length, and row 0 is one of them, because
transformers counts positions in row 0 and sizes masks by the first row of each kind.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from shoal.errors import PlanError
from shoal.plan.generate_ways import SHORT_CACHE, says
from shoal.plan.steps import Step

KeysValues = tuple[torch.Tensor, torch.Tensor]
Store = Callable[[torch.Tensor, torch.Tensor], KeysValues]
"""Puts new keys and values into the row and answers with what is to be attended to."""
Take = Callable[[Store, torch.Tensor, torch.Tensor], KeysValues]
"""Called instead of a row's update, with what would have been done and this call's keys and values."""


_MARK = "_shoal_contents"
"""The attribute of a cache that holds its `CacheContents`."""


@dataclass(eq=False)
class CacheContents:
    """What fills a KV cache: some runs in their order, with the tensors that they use in place of the model's own.

    Two plans may have the same rows and fill them with other keys and values, so rows alone do not tell them apart.
    """

    rows: tuple[int, ...]
    """For each slot the base row whose type it needs."""
    steps: tuple[Step, ...] | None = None
    """What runs, gates and exits left out; None: whoever has these rows may go on."""
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    whole: bool = False
    """Whether this is the base model itself, which may go on with what no plan has filled."""
    owner: object | None = None
    """The policy that decided what was stored, if there was one: nobody else knows what is missing."""

    stored: int = -1
    """The last base row that holds keys and values of a layer of its own."""

    def may_extend(self, before: CacheContents) -> bool:
        """Whether a cache that `before` filled may be filled further by this."""
        if self.rows != before.rows or self.steps is None or before.steps is None:
            return self.rows == before.rows
        if before.owner is not None and before.owner is not self.owner:
            return False
        return self.steps == before.steps and _equal(self.tensors, before.tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheContents:
        return self


def _equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor is other[name] or (tensor.shape == other[name].shape and torch.equal(tensor.cpu(), other[name].cpu()))
        for name, tensor in one.items()
    )


def prepare_rows(cache: Cache, contents: CacheContents) -> None:
    """Give `cache` one empty row for each slot, and note beside it what fills it.

    Called before the first layer of every forward; a cache that was fitted already is left alone. Raises P123 when the
    cache holds tokens from another plan, or from the same one with other tensors, P144 when it lacks a row.
    """
    if isinstance(cache, EncoderDecoderCache):
        prepare_rows(cache.self_attention_cache, contents)
        prepare_rows(cache.cross_attention_cache, contents)
        return
    known = cache.__dict__.get(_MARK)
    if known is contents:
        return
    if known is None:
        if not contents.whole and any(_tokens(row) for row in cache.layers):
            raise _filled_otherwise()
        needed = contents.stored if contents.whole else max(contents.rows, default=-1)
        if cache.layers and needed >= len(cache.layers):  # one made without a config grows as the slots are written
            sentence, code = says(SHORT_CACHE, rows=len(cache.layers), needed=needed)
            raise PlanError(sentence, code=code)
        if cache.layers and not contents.whole:
            cache.layers[:] = _in_order(cache.layers, contents.rows)
    elif not contents.may_extend(known) and (known.rows != contents.rows or any(_tokens(row) for row in cache.layers)):
        raise _filled_otherwise()
    cache.__dict__[_MARK] = contents


def mark_rows(cache: Cache, rows: tuple[int, ...]) -> None:
    """Note that the rows of `cache` are in the order of the slots `rows` already, whoever runs on it next."""
    cache.__dict__[_MARK] = CacheContents(rows)


def _in_order(layers: list[Any], rows: tuple[int, ...]) -> list[Any]:
    fresh: list[Any] = []
    used: set[int] = set()
    for row in rows:
        fresh.append(copy.deepcopy(layers[row]) if row in used else layers[row])
        used.add(row)
    return fresh


def _filled_otherwise() -> PlanError:
    return PlanError("this KV cache was filled under another plan; start with an empty cache", code="P123")


def _tokens(row: Any) -> int:
    if not getattr(row, "is_initialized", False) or getattr(row, "keys", None) is None:
        return 0
    return int(row.get_seq_length())


class PassingCache(Cache):
    """Stores nothing: hands keys and values back, so that a pass without a cache can still share them across layers."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> KeysValues:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def slot_view(
    cache: Cache,
    row: int,
    *,
    read: KeysValues | None = None,
    keep: Callable[[KeysValues], None] | None = None,
    take: Take | None = None,
) -> Cache:
    """`cache` as one layer shall see it: every method with a `layer_idx` lands in `row`, whatever index it is given.

    With `read`, update stores nothing and answers with these keys and values. With `keep`, its answer is handed on, for
    later layers to read (a sliding row stores less than it returns, so the stored tensors would not do). With `take`,
    that function decides what is stored and attended to.
    """
    if isinstance(cache, EncoderDecoderCache):  # some decoders without an encoder use one too
        pair = copy.copy(cache)
        pair.self_attention_cache = slot_view(cache.self_attention_cache, row, read=read, keep=keep, take=take)
        pair.cross_attention_cache = slot_view(cache.cross_attention_cache, row)
        pair.is_updated = _Flag(cache.is_updated, row)
        return pair
    view = _view_type(type(cache)).__new__(_view_type(type(cache)))
    view.__dict__ = cache.__dict__
    view._inner, view._row, view._read, view._keep, view._take = cache, row, read, keep, take
    return view


class _Flag(dict[int, bool]):
    """`is_updated` for one layer: whether its row of the cross-attention is filled, whatever index it asks for."""

    def __init__(self, flags: dict[int, bool], row: int) -> None:
        super().__init__()
        self._flags, self._row = flags, row

    def get(self, key: int, default: Any = None) -> Any:
        return self._flags.get(self._row, default)

    def __getitem__(self, key: int) -> bool:
        return self._flags[self._row]

    def __setitem__(self, key: int, value: bool) -> None:
        self._flags[self._row] = value


class _Rows:
    """`cache.layers` for a layer that looks into its own row directly."""

    def __init__(self, layers: list[Any], row: int) -> None:
        self._layers, self._row = layers, row

    def __getitem__(self, index: Any) -> Any:
        return self._layers[self._row] if isinstance(index, int) else self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Any:
        return iter(self._layers)


_VIEW_TYPES: dict[type[Cache], Any] = {}
"""Not functools.cache, which torch.compile warns about and looks through."""


def _view_type(cache_type: type[Cache]) -> Any:
    found = _VIEW_TYPES.get(cache_type)
    if found is None:
        found = _VIEW_TYPES[cache_type] = _make_view_type(cache_type)
    return found


def prepare_views(*cache_types: type[Cache]) -> None:
    """Make the classes of their views now: torch.compile cannot trace the making of a class."""
    for cache_type in cache_types:
        _view_type(cache_type)


def _make_view_type(cache_type: type[Cache]) -> Any:
    """A subclass (isinstance still holds) derived from the installed cache: new methods are covered by themselves."""
    namespace: dict[str, Any] = {
        "__slots__": ("_inner", "_keep", "_read", "_row", "_take"),
        "layers": property(lambda self: _Rows(self._inner.layers, self._row)),
        "__getattr__": lambda self, name: getattr(self._inner, name),
    }
    for name, method in inspect.getmembers(cache_type, inspect.isfunction):
        parameters = list(inspect.signature(method).parameters)
        if "layer_idx" in parameters:
            namespace[name] = _redirect(name, method, parameters.index("layer_idx") - 1)
    namespace["update"] = _update(namespace["update"])
    return type(f"Slot{cache_type.__name__}", (cache_type,), namespace)


def _redirect(name: str, method: Callable[..., Any], place: int) -> Callable[..., Any]:
    @wraps(method)
    def redirected(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > place:
            args = (*args[:place], self._row, *args[place + 1 :])
        else:
            kwargs["layer_idx"] = self._row
        return getattr(self._inner, name)(*args, **kwargs)

    return redirected


def _update(redirected: Callable[..., KeysValues]) -> Callable[..., KeysValues]:
    @wraps(redirected)
    def update(self: Any, *args: Any, **kwargs: Any) -> KeysValues:
        if self._read is not None:
            return self._read
        if self._take is not None:
            keys = args[0] if args else kwargs.pop("key_states")
            values = args[1] if len(args) > 1 else kwargs.pop("value_states")
            return self._take(lambda k, v: redirected(self, k, v, *args[2:], **kwargs), keys, values)
        states = redirected(self, *args, **kwargs)
        if self._keep is not None:
            self._keep(states)
        return states

    return update
