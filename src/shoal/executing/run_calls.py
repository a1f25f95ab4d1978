"""How the layer of a run is called: with which state, which row of the cache, and what runs hand to each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache

from shoal.executing.around_runs import AroundRuns
from shoal.executing.calls import Call, first_state, hidden_of
from shoal.executing.checkpointed import Around, SharedKV, is_checkpointed
from shoal.executing.forward import with_passing_cache
from shoal.executing.layer_runner import LayerRunner
from shoal.executing.paged import Pages
from shoal.executing.recorder import Recorder, RunRecord
from shoal.executing.sharing import Mix, Sharing
from shoal.executing.slots import KeysValues, Store, Take, slot_view
from shoal.executing.threads import Exchanges, InForward
from shoal.executing.weights import Tensors
from shoal.models.examine import LayerFacts
from shoal.plan import Run
from shoal.plan.sources import LayerKV


class RunCalls(InForward):
    """Of an executor: from what the stock forward calls a layer with to what a run makes of its state."""

    facts: list[LayerFacts]
    runner: LayerRunner
    around_runs: AroundRuns
    exchanges: Exchanges
    around: tuple[Around, ...] = ()
    sharing: Sharing
    slots: dict[tuple[int, int], int]
    pages: Pages
    carried: dict[str | int, int]
    recorder: Recorder | None
    cache: Cache | None
    weights: Tensors

    def _run(
        self,
        run: Run,
        at: tuple[int, int],
        hidden: torch.Tensor,
        index: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        around_run = self.around_runs.of(run)
        if around_run is not None:
            hidden = around_run.front(hidden, self.now.behind)
        call = self._call_of(run, at, hidden, (args, kwargs) if run.layer == index else self.now.calls[run.layer])
        layer, comes_first = self.runner.layer_of(run), self.now.extra is None
        shared = self._shared_kv(run) if is_checkpointed(layer) else None
        shared_map = self.sharing.shared_map(run, layer, self.now)
        with self.exchanges.during(run.layer):
            around = (*self.around, *self.sharing.heads(run, layer))
            out = self.runner.call(
                run, call, comes_first=comes_first, around=around, shared=shared, shared_map=shared_map
            )
        state = first_state(out)
        if around_run is not None:
            state = around_run.behind(hidden, state)
        if self.recorder is not None:
            behind_attention = partial(self.runner.behind_attention, run, call)
            self.recorder.ran(RunRecord(run, hidden_of(call), state, behind_attention))
        if isinstance(out, tuple | list):
            self.now.extra = tuple(out[1:])
            self.now.carried = {at: out[1 + n] for at, n in self.carried.items()}
        return state

    def _call_of(self, run: Run, at: tuple[int, int], hidden: torch.Tensor, call: Call) -> Call:
        """What the layer of `run`, the one `at` (position of its step, branch), is called with: this state, its own row
        of the cache, what was carried along."""
        args, kwargs = call
        if self.carried:
            args = tuple(self.now.carried.get(at, value) for at, value in enumerate(args))
            kwargs = {at: self.now.carried.get(at, value) for at, value in kwargs.items()}
        kwargs = self.pages.seen_by(at, kwargs)
        swap = partial(self._cache_for, run, self.slots.get(at))
        if args:
            args = (hidden, *(swap(a) if isinstance(a, Cache) else a for a in args[1:]))
            kwargs = {k: swap(v) if isinstance(v, Cache) else v for k, v in kwargs.items()}
        else:
            kwargs = {k: swap(v) if isinstance(v, Cache) else v for k, v in kwargs.items()} | {"hidden_states": hidden}
        if self._concerns_kv(run):
            place = self.facts[run.layer].cache_at
            return with_passing_cache(run, place, (args, kwargs), self.now, partial(self._cache_for, run, 0))
        return args, kwargs

    def _shared_kv(self, run: Run) -> SharedKV | None:
        """What a checkpointed run takes and hands on in place of a cache."""
        place = self.facts[run.layer].cache_at
        if place is None or not self._concerns_kv(run):
            return None
        return self.sharing.checkpointed(run, place, self.now, self.weights, partial(self._keep, run))

    def _concerns_kv(self, run: Run) -> bool:
        return self.sharing.concerns_kv(run) or (self._tells_kv(run) and run.part != "mlp")

    def _cache_for(self, run: Run, slot: int | None, cache: Cache) -> Cache:
        keep = partial(self._keep, run) if run.layer in self.sharing.kv or self._tells_kv(run) else None
        where, row = self._place(run, slot, cache)
        mix = self.sharing.added_to(run, self.now, self.weights)
        if run.half is not None:
            return slot_view(where, row, take=self.sharing.halved(run, self.now, mix, keep))
        if mix is not None:
            return slot_view(where, row, take=_mixing(mix, keep))
        return slot_view(where, row, read=self.sharing.read(run, self.now), keep=keep)

    def _place(self, run: Run, slot: int | None, cache: Cache) -> tuple[Cache, int]:
        """The cache that a run writes to, and its row there."""
        if self.cache is not None:
            return self.cache, self.facts[run.layer].row
        return cache, 0 if slot is None else slot

    def _tells_kv(self, run: Run) -> bool:
        return self.recorder is not None and self.recorder.wants_kv and self.facts[run.layer].keys is not None

    def _keep(self, run: Run, states: KeysValues) -> None:
        if run.layer in self.sharing.kv:
            self.now.made[LayerKV(run.layer)] = states
        if self.recorder is not None:
            self.recorder.stores(run, *states)


def _mixing(mix: Mix, keep: Callable[[KeysValues], None] | None) -> Take:
    def take(store: Store, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        states = store(*mix(keys, values))
        if keep is not None:
            keep(states)
        return states

    return take
