"""Runs that read the keys and values of a layer that runs later.

All steps wait for the call of the last layer, by which the stock forward has prepared all others. Then they go over the
new tokens in passes. A reader sees what its source stored for earlier tokens, what it made of this forward's tokens in
the pass before, and never the token itself. So the first pass is right for the first new token, the second for the
first two, and after as many passes as there are new tokens, or once what is read upwards no longer changes, all of
them are what token by token would have made. The last pass is the one that the cache keeps.

Source: Wu and Tu 2024 (LCKV, arXiv 2405.10637): queries attend to a layer above with the diagonal masked; the first
token, which sees nothing, gets a zero from its attention.

How we differ: passes go on until nothing changes, where the paper has a fixed number (`passes` sets one); gradients go
through all of them, where the paper leaves out the first ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from shoal.errors import PlanError
from shoal.executing.attention_maps import attending
from shoal.executing.calls import argument, cache_of, hidden_of
from shoal.executing.checkpointed import is_checkpointed
from shoal.executing.executor import Executor
from shoal.executing.forward import Forward, Segment
from shoal.executing.rewind import Rewind, copied, rows_of
from shoal.executing.slots import KeysValues, PassingCache, Store, slot_view
from shoal.executing.tokens_before import Seen, tokens_before
from shoal.plan import Run, Step
from shoal.plan.capabilities import refused
from shoal.plan.later import later_sources
from shoal.plan.sources import STORED, LayerKV
from shoal.plan.steps import runs


@dataclass(frozen=True, slots=True)
class Passes:
    """How often the steps of a plan with later sources went over the new tokens of one forward."""

    ran: int
    tokens: int
    """How many new tokens there were: with so many passes the forward is exact."""
    exact: bool
    """Whether token by token would give the same. False is an *approximate prefill*: the passes were cut short."""


@dataclass
class PassForward(Forward):
    """The record of a forward in passes."""

    before: dict[int, KeysValues] = field(default_factory=dict)
    """By source the keys and values that it made of the new tokens in the pass before."""
    fresh: dict[int, KeysValues] = field(default_factory=dict)
    """The same of this pass."""
    seen: dict[int, Seen] = field(default_factory=dict)
    """By source what is read in this pass."""

    def begin(self, *, again: bool) -> None:
        """A pass begins, `again` with what the one before it was given."""
        if not again:
            self.before = self.fresh
        self.fresh, self.seen, self.made, self.extra, self.passing = {}, {}, {}, None, None
        self.behind = {}

    def is_settled(self) -> bool:
        """Whether this pass made what the one before it made."""
        return self.before.keys() == self.fresh.keys() and all(
            torch.equal(one, other)
            for layer, states in self.fresh.items()
            for one, other in zip(states, self.before[layer], strict=True)
        )


_UNTRACED: list[Callable[[LaterExecutor, torch.Tensor, Cache | None], torch.Tensor]] = []
"""`LaterExecutor._in_passes`, which no compiler traces: how often it goes over the steps depends on what they make.
Made with the first executor, as torch imports its compiler for it."""


class LaterExecutor(Executor):
    """Runs the steps of a plan in which runs read later layers."""

    passes: int | None = None
    """At most so many passes; None: until the forward is exact."""
    ran: Passes | None = None
    """Of the last forward."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if not _UNTRACED:
            _UNTRACED.append(torch.compiler.disable(LaterExecutor._in_passes))
        read = {source.layer for _, _, source in later_sources(self.steps)}
        self.source_rows: dict[int, int] = {}
        """By base layer that is read upwards the slot of its last run."""
        for (position, branch), slot in self.slots.items():
            run = list(runs((self.steps[position],)))[branch]
            if run.layer in read and run.stores == STORED:
                self.source_rows[run.layer] = slot

    def run_step(
        self, step: Step, hidden: torch.Tensor, forward: Forward, *, cache: Cache | None = None
    ) -> torch.Tensor:
        """As in `Executor`. Raises P163 for a step that reads a later one: it does not run alone."""
        for run in runs((step,)):
            if (source := _read(run)) in self.source_rows:
                raise PlanError(
                    f"layer {run.layer} reads the KV of layer {source}, which runs later, so its step cannot run "
                    "alone, as fits and losses block by block ask; name an earlier layer",
                    code="P163",
                )
        return super().run_step(step, hidden, forward, cache=cache)

    def _proxy_call_in_segment(self, segment: Segment, index: int, call: Any) -> Any:
        if segment.begin < self.depth and (segment.begin > 0 or segment.end < self.depth - 1):
            raise PlanError(
                "in this plan layers read others that run later, so no forward can begin or end between two of them; "
                "run it whole",
                code="P163",
            )
        return super()._proxy_call_in_segment(segment, index, call)

    def _start(self, call: Any) -> None:
        super()._start(call)
        self.now = PassForward()

    @property
    def _passing(self) -> PassForward:
        assert isinstance(self.now, PassForward)
        return self.now

    def _proxy_call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index == 0:
            self._start((args, kwargs))
        self.now.calls[index] = (args, kwargs)
        hidden = hidden_of((args, kwargs))
        if index < self.depth - 1:
            return self.as_bare_output(index, hidden)
        hidden = _UNTRACED[0](self, hidden, cache_of((args, kwargs)))
        returned = self.as_layer_output(index, hidden)
        self.now = Forward()
        return returned

    def _in_passes(self, entering: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """The state behind the last step. A recorder hears the last pass alone."""
        tokens = entering.shape[-2]
        limit = tokens if self.passes is None else min(self.passes, tokens)
        rewind = Rewind(cache) if cache is not None and (limit > 1 or self.recorder is not None) else lambda: None
        recorder, self.recorder = self.recorder, None
        try:
            for ran in range(1, limit + 1):
                if ran > 1:
                    rewind()
                hidden = self._pass(entering)
                exact = ran == tokens or self._passing.is_settled()
                if exact:
                    break
        finally:
            self.recorder = recorder
        self.ran = Passes(ran, tokens, exact)
        if recorder is None:
            return hidden
        rewind()
        hidden = self._pass(entering, again=True)
        recorder.noted(self.now.behind)
        recorder.leaves(hidden)
        return hidden

    def _pass(self, hidden: torch.Tensor, *, again: bool = False) -> torch.Tensor:
        self._passing.begin(again=again)
        self.now.carried = {at: argument(self.now.calls[0], at) for at in self.carried}
        if -1 in self.noted:
            self.now.behind[-1] = hidden
        for index, due in enumerate(self.steps_at):
            if self.recorder is not None:
                self.recorder.enters(index, hidden)
            for position, step in due:
                hidden = self._noting(position, step, hidden, -1, (), {})
        return hidden

    def _source(self, run: Run) -> int | None:
        """The later layer that this run reads; None for a run that reads none, or one that has run in this pass."""
        read = _read(run)
        return read if read in self.source_rows and read not in self._passing.fresh and run.part != "mlp" else None

    def _run(
        self,
        run: Run,
        at: tuple[int, int],
        hidden: torch.Tensor,
        index: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        source = None if not isinstance(self.now, PassForward) else self._source(run)
        if source is None:
            return super()._run(run, at, hidden, index, args, kwargs)
        layer = self.runner.layer_of(run)
        if is_checkpointed(layer):
            no = refused("later source", "checkpointed", run)
            assert no is not None
            raise PlanError(no.message, code=no.code)
        attend = tokens_before(layer, run, lambda: self._passing.seen[source])
        with self.exchanges.during(run.layer), attending(layer, attend):
            return super()._run(run, at, hidden, index, args, kwargs)

    def _cache_for(self, run: Run, slot: int | None, cache: Cache) -> Cache:
        if not isinstance(self.now, PassForward):
            return super()._cache_for(run, slot, cache)
        where, row = self._place(run, slot, cache)
        source = self._source(run)
        if source is not None:
            return slot_view(where, row, read=self._seen(source, cache))
        if run.layer not in self.source_rows or run.stores != STORED:
            return super()._cache_for(run, slot, cache)
        mix = self.sharing.added_to(run, self.now, self.weights)

        def take(store: Store, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
            if mix is not None:
                keys, values = mix(keys, values)
            self._passing.fresh[run.layer] = keys, values
            states = store(keys, values)
            self._keep(run, states)
            return states

        return slot_view(where, row, take=take)

    def _seen(self, source: int, cache: Cache) -> KeysValues:
        """What the source's row would hold behind this forward, with what the source made in the pass before."""
        now = self._passing
        if source not in now.seen:
            slot, rows = self.source_rows[source], rows_of(cache)
            row = rows[slot] if slot < len(rows) and not isinstance(cache, PassingCache) else None
            new = now.before.get(source)
            states = self._blank(source, row) if new is None else new
            begin: Any = 0
            if row is not None:
                begin = row.get_seq_length() - row.get_mask_sizes(states[0].shape[-2])[1]
                ahead = copied(row)
                ahead.prefetch()  # of a cache that keeps its rows elsewhere
                states = ahead.update(*states)
            now.seen[source] = Seen(states, begin, new is not None)
        return now.seen[source].states

    def _blank(self, source: int, row: Any) -> KeysValues:
        """Keys and values of the new tokens before the source has made any; nobody sees them."""
        hidden, fact = hidden_of(self.now.calls[source]), self.facts[source]
        assert fact.keys is not None  # check P109
        assert fact.values is not None
        held = getattr(row, "keys", None)
        like = held if isinstance(held, torch.Tensor) else hidden
        batch, tokens = hidden.shape[-3:-1]
        # a row that is filled says how many heads the source stores, which tensors of its own may make fewer
        heads = held.shape[1] if isinstance(held, torch.Tensor) and held.dim() == len(fact.keys) else fact.keys[1]
        keys, values = (like.new_zeros((batch, heads, tokens, shape[-1])) for shape in (fact.keys, fact.values))
        return keys, values


def _read(run: Run) -> int | None:
    """The layer whose keys and values, the two of them, a run reads."""
    return next((source.layer for source in run.layer_sources if isinstance(source, LayerKV)), None)
