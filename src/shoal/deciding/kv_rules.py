"""What is stored for a token that skips a layer, so that all rows of the KV cache keep the same length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from shoal.deciding.arguments import Arguments, Call, argument, with_argument
from shoal.deciding.entries import COPIED, HOLE, PENDING, PROJECTED, Entries
from shoal.deciding.gates import Decision
from shoal.deciding.masks import holed, seen_columns
from shoal.errors import PlanError
from shoal.executing.slots import KeysValues, Store, Take
from shoal.models.examine import LayerFacts, StackFacts
from shoal.plan import Run

CODES = {None: HOLE, "project": PROJECTED, "copy": COPIED, "mask": HOLE, "defer": PENDING}
Kind = tuple[Any, ...]


def kinds_of(probe: StackFacts) -> list[Kind]:
    """What two layers must have in common for one to take the other's keys and values: their shapes and window."""
    return [(fact.keys, fact.values, fact.window) for fact in probe.layers]


class Filled(Exception):  # noqa: N818 - a signal, no error
    """Raised where a layer stores its keys and values, when nothing of it but these is wanted."""


@dataclass
class Forward:
    """The cache's side of one forward."""

    cache: Cache | None
    entries: Entries
    past: int
    tokens: int
    rows: int
    fresh: dict[Kind, KeysValues] = field(default_factory=dict)
    """The newest keys and values of each kind of layer, [batch, heads, tokens, dim], for the fill "copy"."""
    projected: int = 0
    """Tokens x layers of which nothing but keys and values was computed."""


@dataclass(frozen=True)
class Place:
    """One run that stores KV: where, and what its layer is like."""

    run: Run
    slot: int
    fact: LayerFacts
    kind: Kind


class Rules:
    """The fills of a plan. `copies`: the kinds of layers that some run copies from; `arguments`: for masks."""

    def __init__(self, copies: set[Kind], arguments: Arguments | None) -> None:
        self.copies, self.arguments = copies, arguments

    def ready(
        self, place: Place, now: Forward, active: Decision, call: Call, hidden: torch.Tensor
    ) -> tuple[Call, Take | None]:
        """Before a run that is executed, for all tokens or for those that are `active`: its call, and what its cache is
        to do. Raises P139 for a run that would read what was never stored."""
        if place.run.kv.fill is None:
            _refuse_holes(place, now, active)
        if not isinstance(active, bool):
            now.entries.mark(place.slot, now.past, CODES[place.run.kv.fill], ~active)
        if place.run.kv.fill == "mask":
            call = self._masked(place, now, call, hidden)
        return call, self._taking(place, now, active)

    def _masked(self, place: Place, now: Forward, call: Call, hidden: torch.Tensor) -> Call:
        readable = now.entries.readable(place.slot, now.past + now.tokens)
        if readable is None:
            return call
        assert self.arguments is not None
        at = self.arguments.masks[place.run.layer]
        assert at is not None
        return with_argument(
            call,
            at,
            holed(
                argument(call, at),
                readable,
                past=now.past,
                tokens=now.tokens,
                keys=seen_columns(now.cache, place.slot, now.tokens),
                window=place.fact.window,
                boolean=self.arguments.boolean[place.run.layer],
                like=hidden,
            ),
        )

    def _taking(self, place: Place, now: Forward, active: Decision) -> Take | None:
        """A run whose keys and values others copy shows them; one that copies for some tokens mixes them in."""
        if place.kind not in self.copies:
            return None

        def take(store: Store, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
            if place.run.kv.fill == "copy" and not isinstance(active, bool):
                own, (old_keys, old_values) = active[:, None, :, None], now.fresh[place.kind]
                keys, values = torch.where(own, keys, old_keys), torch.where(own, values, old_values)
            now.fresh[place.kind] = keys, values
            return store(keys, values)

        return take

    def skip(self, place: Place, now: Forward, hidden: torch.Tensor, run_layer: Callable[[Take], None]) -> None:
        """Instead of a run that no token needs. `run_layer` calls the layer with a cache that does as told."""
        if now.cache is None:
            return  # nothing comes after this pass
        now.entries.mark(place.slot, now.past, CODES[place.run.kv.fill])
        match place.run.kv.fill:
            case "project":
                now.projected += now.rows * now.tokens
                run_layer(_store_and_stop)
            case "copy":
                _stored(now.cache, place.slot, *now.fresh[place.kind])
            case _:
                _stored(now.cache, place.slot, *_nothing(place.fact, now, hidden))


def _store_and_stop(store: Store, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
    store(keys, values)
    raise Filled


def _stored(cache: Cache, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    cache.update(keys, values, slot)


def _nothing(fact: LayerFacts, now: Forward, hidden: torch.Tensor) -> KeysValues:
    """Zeros that keep the row as long as the others; nobody reads them."""
    assert fact.keys is not None
    assert fact.values is not None
    keys, values = (hidden.new_zeros(now.rows, s[1], now.tokens, s[3]) for s in (fact.keys, fact.values))
    return keys, values


def _refuse_holes(place: Place, now: Forward, active: Decision) -> None:
    """Without a fill nobody may run a layer that it has skipped: not behind older columns, nor within this pass."""
    readable = now.entries.readable(place.slot, now.past)
    bad = False
    if readable is not None:
        rows = slice(None) if isinstance(active, bool) else active.any(-1).cpu().expand(now.rows)
        bad = not bool(readable[rows].all())
    if not bad and not isinstance(active, bool):
        bad = bool((active & (~active).int().cummax(-1).values.bool()).any())
    if bad:
        raise PlanError(
            f"layer {place.run.layer} would read keys and values that were never stored, since the policy skipped it "
            f"before; give it a fill, as in {place.run.layer}?gate/project",
            code="P139",
        )
