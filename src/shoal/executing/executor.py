"""The stock forward stays in charge: its loop over the layers meets proxies that decide which real layers run.

Proxy i is called with everything that the stock forward prepared for base layer i: masks, rotary tables, inputs of its
own. A step of the plan runs at the first proxy call by which all layers it needs have been offered, so a plan that
keeps the order runs inside the very iterations it belongs to (values that the loop carries along stay right) and a
reordered one runs as soon as it can. The hidden state always travels through the stock loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, assert_never

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from shoal.executing.around_runs import AroundRuns
from shoal.executing.asked import SaidDepth, refuse_counting
from shoal.executing.calls import Call, argument, caches_of, hidden_of, with_hidden
from shoal.executing.exit_heads import Heads
from shoal.executing.fewer_heads import makes_fewer
from shoal.executing.forward import Forward, Segment
from shoal.executing.groups import joined
from shoal.executing.layer_list import LayerProxyList
from shoal.executing.layer_runner import LayerRunner
from shoal.executing.paged import Obstacle, Pages, paging_obstacle
from shoal.executing.recorder import Recorder, attention_hooks
from shoal.executing.run_calls import RunCalls
from shoal.executing.sharing import Sharing
from shoal.executing.slots import CacheContents, PassingCache, prepare_rows, prepare_views
from shoal.executing.threads import exchanges_of
from shoal.executing.weights import Tensors
from shoal.models.examine import StackFacts
from shoal.models.lists import Stack
from shoal.plan import Exit, Map, Parallel, Run, Step
from shoal.plan.heads import depths_read
from shoal.plan.schedule import schedule, slots_of
from shoal.plan.steps import ends_in, runs, undecided, writes_kv


class Executor(RunCalls):
    """Runs the steps of one stack's plan.

    Three calls are there for others: `run_step` runs one step on a given state; `between` lets a forward begin at a
    layer with a given state and end behind another; `recording` reports what runs see and make. `prepared` is the
    record that `run_step` needs: what the stock forward calls the layers with.
    """

    decides: ClassVar[bool] = False
    """Whether a policy or a draft says token by token what runs."""

    def __init__(
        self, planned: LayerProxyList, stack: Stack, facts: StackFacts, steps: tuple[Step, ...], weights: Tensors
    ) -> None:
        super().__init__()
        self.planned, self.stack = planned, stack
        self.facts = facts.layers
        self.steps = steps
        self.depth = stack.depth
        self.carried = {at: n for fact in self.facts for at, n in fact.carried.items()}
        self.steps_at, self.needed_later = schedule(steps, stack.depth)
        self.slots = slots_of(steps)
        self.rows = tuple(self.facts[run.layer].row for run in runs(steps) if writes_kv(run))
        self.sharing = Sharing(steps, makes_fewer(steps, self.facts, weights))
        # a plan that runs every layer once, whole and in order needs no view: the layers' own rows are right
        self.plain = self.rows == tuple(fact.row for fact in self.facts) and not self.sharing.sources
        self.passthrough = [
            self.plain and i not in self.needed_later and [step for _, step in due] == [Run(i)]
            for i, due in enumerate(self.steps_at)
        ]
        if self.needed_later:
            self.passthrough[-1] = False  # where what was kept is forgotten
        self.pages = Pages(stack, steps)
        self.unpaged: Obstacle | None = "heads" if self.sharing.fewer else paging_obstacle(steps)
        self.exchanges, self._said = exchanges_of(stack, steps, self.sharing), SaidDepth(stack)
        self.owner: object | None = None
        """Who decides at run time, if anybody does: nobody else may go on with a cache that was filled so."""
        self.paused = False
        """Whether the plan was taken away for a while: what the model computes is not the plan's."""
        self.heads: Heads | None = None
        """Of the plan's exits, where they have any of their own."""
        self.recorder: Recorder | None = None
        self.segment: Segment | None = None
        self.cache: Cache | None = None
        """The cache that steps run alone write to, in the place of the one in the record."""
        self.use(weights)
        self.noted = depths_read(steps, weights) | self.around_runs.reads
        """The layers whose states runs or heads of the plan read, -1 for what comes in."""
        for layer in self.noted:
            self.passthrough[max(0, layer)] = False
        prepare_views(DynamicCache, StaticCache, PassingCache)

    # what others call

    def refuse_asked(self, settings: Any, given: Mapping[str, Any]) -> None:
        """Called by `generate` before anything is computed, with its whole generation config and what else it was
        given. Raises P142, see `refuse_counting`."""
        refuse_counting(settings, given)

    def use(self, weights: Tensors) -> None:
        """From now on these are the plan's tensors. Whoever binds a plan has checked that they fit."""
        self.weights = weights
        self.runner = LayerRunner(self.planned, self.stack, self.facts, weights)
        self.around_runs = AroundRuns(self.steps, weights, self.layer)
        self._cache_contents: CacheContents | None = None
        if self.heads is not None:
            self.heads.weights = weights

    def prepared(self, forward: Callable[[], Any]) -> Forward:
        """What the stock forward calls every layer with, and what it hands the first one, while none of them runs.

        `forward` calls the model while this executor's list is in place.
        """
        record = Forward()
        before, self._preparing = self._preparing, record
        try:
            forward()
        finally:
            self._preparing = before
        return record

    def run_step(
        self, step: Step, hidden: torch.Tensor, forward: Forward, *, cache: Cache | None = None
    ) -> torch.Tensor:
        """The output of one step, [batch, tokens, hidden], for the state `hidden` and the calls in `forward`.

        `cache`: where its keys and values go, each layer to its own row, in place of the cache in the calls.
        """
        outer = self.now, self.cache
        self.now, self.cache = forward, cache
        try:
            # no layer has the index -1: every run finds what its own layer is called with in the record
            return self._noting(-1, step, hidden, -1, (), {})
        finally:
            self.now, self.cache = outer

    @contextmanager
    def between(self, begin: int = 0, state: torch.Tensor | None = None, end: int | None = None) -> Iterator[None]:
        """Until the end of the block forwards run from the proxy of base layer `begin` to that of `end`, both included.

        `state`: the hidden state that enters there, in place of the one that the stock forward brings. Proxies before
        and behind hand on what they are given. Beyond the last layer, `begin` = depth, no layer runs at all: the model
        makes of `state` what it makes of its last hidden state, and a forward that is under way is not touched.
        """
        before = self.segment
        self.segment = Segment(begin, state, self.depth - 1 if end is None else end)
        try:
            yield
        finally:
            self.segment = before

    @contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """Until the end of the block `recorder` is called for everything that runs."""
        before, self.recorder = self.recorder, recorder
        called = self.runner.called(self.steps) if recorder.wants_maps else []
        handles = attention_hooks(called, recorder, lambda: self.paused or self.recorder is not recorder)
        try:
            yield
        finally:
            self.recorder = before
            for handle in handles:
                handle.remove()

    @property
    def cache_contents(self) -> CacheContents:
        """The runs and tensors with which this executor fills a KV cache."""
        if self._cache_contents is None:
            steps = tuple(step for step in undecided(self.steps) if not isinstance(step, Exit))
            whole = steps == tuple(Run(i) for i in range(self.depth))
            stored = max((fact.row for fact in self.facts if fact.keys is not None), default=-1)
            self._cache_contents = CacheContents(self.rows, steps, self.weights, whole, self.owner, stored)
        return self._cache_contents

    def layer(self, index: int) -> Any:
        """The real layer with this base index."""
        return self.runner.layer(index)

    def as_bare_output(self, index: int, hidden: torch.Tensor) -> Any:
        """`hidden` in the shape in which layer `index` returns it, without its other return values."""
        tail = self.facts[index].tail
        return hidden if tail < 0 else (hidden, *[None] * tail)

    # the way of a forward

    _preparing: Forward | None = None

    def proxy_call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called by the stock loop in place of layer `index`."""
        if self._preparing is not None:
            self._preparing.calls[index] = (args, kwargs)
            return self.as_bare_output(index, hidden_of((args, kwargs)))
        if self.segment is not None:
            return self._proxy_call_in_segment(self.segment, index, (args, kwargs))
        return self._proxy_call(index, args, kwargs)

    def _proxy_call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if index == 0:
            self._start((args, kwargs))
        recorder = self.recorder
        if self.passthrough[index] and recorder is None:
            return self.layer(index)(*args, **kwargs)
        if index in self.needed_later:
            self.now.calls[index] = (args, kwargs)
        hidden = hidden_of((args, kwargs))
        if recorder is not None:
            recorder.enters(index, hidden)
        if index == 0 and -1 in self.noted:
            self.now.behind[-1] = hidden
        if self.carried:
            self.now.carried = {at: argument((args, kwargs), at) for at in self.carried}
        for position, step in self.steps_at[index]:
            hidden = self._noting(position, step, hidden, index, args, kwargs)
        if index == self.depth - 1:
            hidden = self._end(hidden)
        returned = self.as_layer_output(index, hidden)
        if index == self.depth - 1:
            behind = self.now.behind
            self.now = Forward()  # nothing of this forward outlives it
            if recorder is not None:
                recorder.noted(behind)
                recorder.leaves(hidden)
        return returned

    def _start(self, call: Call) -> None:
        """A forward begins."""
        self.now = Forward()
        self._said.require()
        self.pages.refuse(self.unpaged, call[1])
        for cache in caches_of(call):
            prepare_rows(cache, self.cache_contents)

    def _proxy_call_in_segment(self, segment: Segment, index: int, call: Call) -> Any:
        if segment.begin >= self.depth:
            return self.as_bare_output(index, hidden_of(call) if segment.state is None else segment.state)
        if not segment.begin <= index <= segment.end:
            if index == 0:
                self._start(call)
            return self.as_bare_output(index, hidden_of(call))
        if index == segment.begin and segment.state is not None:
            call = with_hidden(call, segment.state)
        return self._proxy_call(index, *call)

    def _end(self, hidden: torch.Tensor) -> torch.Tensor:
        """The state that norm and head read, where `hidden` is that behind the last step."""
        return hidden

    def as_layer_output(self, index: int, hidden: torch.Tensor) -> Any:
        """`hidden` in the shape in which layer `index` returns it."""
        tail = self.facts[index].tail
        if tail < 0:
            return hidden
        extra = self.now.extra
        return (hidden, *(extra if extra is not None and len(extra) == tail else [None] * tail))

    def _noting(
        self, position: int, step: Step, hidden: torch.Tensor, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """What a step makes, noted where a run or a head reads it."""
        if self.recorder is not None and isinstance(step, Exit):
            self.recorder.reaches(step, hidden)
        out = self._step(position, step, hidden, index, args, kwargs)
        if self.noted:
            self.now.behind |= dict.fromkeys(self.noted & ends_in(step), out)
        return out

    def _step(
        self, position: int, step: Step, hidden: torch.Tensor, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        match step:
            case Run():
                return self._run(step, (position, 0), hidden, index, args, kwargs)
            case Parallel():

                def call(run: Run, branch: int, state: torch.Tensor) -> torch.Tensor:
                    return self._run(run, (position, branch), state, index, args, kwargs)

                return joined(step, hidden, call)
            case Map():
                return self.runner.map(step, hidden)
            case Exit():
                if self.heads is None or step.gate is not None:  # nobody leaves where nobody decides
                    return hidden
                return self.heads.at_the_end(step.head, hidden, self.now.behind)
            case _:
                assert_never(step)
