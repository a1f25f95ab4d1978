"""The conductor of plans in which a policy decides while the model runs: gates, exits, and what the KV cache is given.

For each step there are three cases. All tokens need it: it runs as in any plan. None does: it is not called, and its
row of the cache gets what the fill says. Some do: it is called for all and the others keep their state, which is right
and saves nothing (the trace calls it simulated).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache

from shoal.deciding.arguments import Arguments, Call, with_argument
from shoal.deciding.deferred import catch_up, wait
from shoal.deciding.entries import entries_of, past_of
from shoal.deciding.flow import Flow, next_run, wide
from shoal.deciding.gates import Decision, Moment, Policy, both, either, settle, unless
from shoal.deciding.kv_rules import Filled, Forward, Place, Rules, kinds_of
from shoal.deciding.masks import real_columns
from shoal.deciding.partly import partly
from shoal.deciding.readout import Heads, Look, Readout
from shoal.deciding.trace import Trace
from shoal.executing.executor import Executor
from shoal.executing.layer_list import PlannedList
from shoal.executing.slots import PassingCache, Take, slot_view
from shoal.executing.weights import Tensors
from shoal.models.examine import StackFacts
from shoal.models.stacks import Stack
from shoal.plan import Exit, Map, Parallel, Run, Step
from shoal.plan.price import layers_run
from shoal.plan.steps import runs


class GatedConductor(Executor):
    """Asks `policy` at each gate and exit of its plan."""

    def __init__(
        self,
        planned: PlannedList,
        stack: Stack,
        probe: StackFacts,
        steps: tuple[Step, ...],
        weights: Tensors,
        policy: Policy,
    ) -> None:
        super().__init__(planned, stack, probe, steps, weights)
        self.policy = self.owner = policy
        self.unpaged = "policy"
        self.kinds = kinds_of(probe)
        copies = {self.kinds[run.layer] for run in runs(steps) if run.kv.fill == "copy"}
        if any(isinstance(step, Exit) for step in steps) or copies or policy.watches:
            self.through = [False] * stack.depth
        self.through[-1] = False  # where a forward ends
        self.rules = Rules(copies, None)
        self.after = {at: next_run(steps, at) for at in range(len(steps))}
        self.trace = Trace(layers=layers_run(runs(steps)))
        self.prompt: int | None = None
        self.inputs: tuple[torch.Tensor | None, Any] = (None, None)
        self.ending: torch.Tensor | None = None
        self.flow: Flow | None = None
        self.last: Moment | None = None
        """The forward that is under way, or was last."""
        self.readout: Readout | None = None
        self.heads: Heads | None = None

    # what the handle sets before the first forward, when the model is still whole
    def know(self, arguments: Arguments | None, readout: Readout | None, heads: Heads | None) -> None:
        """Give what was found by probing: for masks and late runs, for confidence, for own heads."""
        self.rules.arguments, self.readout, self.heads = arguments, readout, heads

    @contextmanager
    def ends_with(self, state: torch.Tensor) -> Iterator[None]:
        """Meanwhile the taps hand on `state`, and nothing of the forward that is under way is touched."""
        self.ending = state
        try:
            yield
        finally:
            self.ending = None

    def tap(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.ending is not None:
            tail = self.facts[index].tail
            return self.ending if tail < 0 else (self.ending, *[None] * tail)
        if index == 0:
            self._begin(args, kwargs)
        if self.through[index] and self.recorder is None:
            self._ran(1.0, True)
        return super().tap(index, args, kwargs)

    def passed(self, index: int, hidden: torch.Tensor) -> Any:
        if index == len(self.due) - 1:
            hidden = self._end(hidden)
        return super().passed(index, hidden)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows, tokens = hidden.shape[-3], hidden.shape[-2]
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        entries = entries_of(cache, self.policy, len(self.rows), rows)
        past = past_of(cache)
        entries.reach(past, tokens)
        ids, mask = self.inputs
        moment = Moment(rows, tokens, past, self.prompt, real_columns(mask, past, tokens), memory=entries.memory)
        self.last = moment
        self.flow = Flow(moment, Forward(cache, entries, past, tokens, rows), ids)
        self.trace.begin(past, rows)
        if self.heads is not None:
            self.heads.now = []
        self.policy.begin(moment)

    def _end(self, hidden: torch.Tensor) -> torch.Tensor:
        flow = self.flow
        assert flow is not None
        moment, counts = flow.moment, self.trace.counts
        if flow.kept is not None:
            hidden = flow.kept if flow.left is True else torch.where(wide(flow.left), flow.kept, hidden)
        if self.heads is not None:
            self.heads.now = [(where, head) for where, head in flow.heads if self.heads.owned(head)]
        depths = torch.full((moment.rows, moment.tokens), flow.depth)
        if flow.extra is not None:
            depths = depths + flow.extra
        counts.asked += float(depths.sum())
        counts.tokens += moment.rows * moment.tokens
        counts.projected += flow.kv.projected
        self.trace.end(flow.ids, depths, moment.real)
        self.flow = None
        return hidden

    def _step(
        self, position: int, step: Step, hidden: torch.Tensor, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        flow = self.flow
        assert flow is not None
        match step:
            case Exit():
                return self._exit(step, hidden, flow)
            case Run():
                return self._gated(
                    position, step, hidden, (args, kwargs) if step.layer == index else self.now.calls[step.layer]
                )
            case Map() | Parallel():
                if flow.left is True:
                    return hidden
                out = super()._step(position, step, hidden, index, args, kwargs)
                return out if flow.left is False else torch.where(wide(flow.left), hidden, out)

    def _exit(self, step: Exit, hidden: torch.Tensor, flow: Flow) -> torch.Tensor:
        if flow.left is True:
            return hidden
        probe = None if self.heads is None else partial(self.heads.probe, step.head)
        sight = Look(hidden, flow.before, partial(self.read, step.head), probe)
        leaves = self.policy.leaves(step, flow.moment, sight) if step.gate is not None else True
        new = settle(unless(leaves, flow.left))
        if new is False:
            return hidden
        state = hidden if self.heads is None else self.heads.lens(step.head, hidden)
        flow.kept = state if new is True or flow.kept is None else torch.where(wide(new), state, flow.kept)
        flow.left = settle(new if flow.left is False else either(flow.left, new))
        flow.heads.append((new, step.head))
        return hidden

    def read(self, head: str, states: torch.Tensor) -> torch.Tensor:
        """The logits of hidden states at an exit with this head; counted as looks."""
        assert self.readout is not None
        self.trace.counts.heads += states.shape[-3] * states.shape[-2]
        if self.heads is None:
            return self.readout(states)
        with self.heads.only(head):
            return self.readout(self.heads.lens(head, states))

    def _gated(self, position: int, step: Run, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        flow = self.flow
        assert flow is not None
        gate = True if step.gate is None else settle(self.policy.runs(step, flow.moment, hidden))
        slot = self.slots.get((position, 0))
        fact = self.facts[step.layer]
        place = None
        if slot is not None and fact.keys is not None and step.part != "mlp":
            place = Place(step, slot, fact, self.kinds[step.layer])
        inside = self.policy.leaves_out == "mlp" and step.gate is not None
        mlp: Decision = gate if inside else True
        active = settle(unless(True if inside else gate, flow.left))
        before, size = hidden, 0.5 if step.part != "layer" else 1.0
        self._ran(size - 0.5 if inside else size, active)
        if inside:
            self._ran(0.5, both(mlp, active))
        deferred = step.kv.fill == "defer"
        if active is False:
            if place is not None:
                if deferred and flow.kv.cache is not None:
                    assert self.rules.arguments is not None
                    wait(flow.kv.entries, flow.kv, position, step.layer, hidden, call, self.rules.arguments)
                self.rules.skip(place, flow.kv, hidden, lambda take: self._fill(step, place, hidden, call, take))
            return hidden
        # whoever left and is to run later anyway may as well run now: its state goes on, its answer is kept
        run = replace(step, part="attention") if mlp is False else step
        with self._whose_mlp(step, mlp):
            out = self._called(position, run, place, hidden, call, True if deferred else active, size)
        out = out if isinstance(active, bool) or deferred else torch.where(wide(active), out, hidden)
        flow.before = before
        if self.policy.watches and active is True:
            self.policy.saw(step, flow.moment, before, out)
        return out

    def _called(
        self,
        position: int,
        step: Run,
        place: Place | None,
        hidden: torch.Tensor,
        call: Call,
        active: Decision,
        size: float,
    ) -> torch.Tensor:
        flow = self.flow
        assert flow is not None
        if place is None:
            return self._run(step, self.slots.get((position, 0)), hidden, step.layer, *call)
        late = None
        if step.kv.fill == "defer" and flow.kv.entries.waiting:
            assert self.rules.arguments is not None
            late = catch_up(place, position, flow.kv, self.rules.arguments, call, hidden)
        if late is not None:
            self.trace.counts.late += int(size * (late.hidden.shape[-2] - hidden.shape[-2]) * hidden.shape[-3])
            out = self._with(late.take, step, place.slot, late.hidden, late.call)
            return late.part(out, self.after[position])
        call, take = self.rules.ready(place, flow.kv, active, call, hidden)
        return self._with(take, step, place.slot, hidden, call)

    def _with(self, take: Take | None, step: Run, slot: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Run the step over a cache that does as `take` says."""
        if take is None:
            return self._run(step, slot, hidden, step.layer, *call)
        args, kwargs = call
        swapped = tuple(_view(a, slot, take) for a in args), {k: _view(v, slot, take) for k, v in kwargs.items()}
        at = self.facts[step.layer].cache_at
        if at is not None and not any(isinstance(v, Cache) for v in (*swapped[0], *swapped[1].values())):
            swapped = with_argument(swapped, at, slot_view(PassingCache(), slot, take=take))
        self.taken = True
        try:
            return self._run(step, slot, hidden, step.layer, *swapped)
        finally:
            self.taken = False

    taken = False

    def _cache_for(self, run: Run, slot: int | None, cache: Cache) -> Cache:
        return cache if self.taken else super()._cache_for(run, slot, cache)

    def _fill(self, step: Run, place: Place, hidden: torch.Tensor, call: Call, take: Take) -> None:
        """Call the layer for its keys and values alone. Weights that accelerate brings in for the call must also be
        taken out again, so such a layer runs to its end."""
        extra, carried = self.now.extra, self.now.carried
        if any(p.is_meta for p in self.layer(step.layer).parameters()):
            self._with(lambda store, k, v: store(k, v), step, place.slot, hidden, call)
        else:
            with suppress(Filled):
                self._with(take, step, place.slot, hidden, call)
        self.now.extra, self.now.carried = extra, carried

    def _whose_mlp(self, step: Run, mlp: Decision) -> AbstractContextManager[None]:
        """Meanwhile the mlp of this layer counts for these tokens alone."""
        if isinstance(mlp, bool):
            return nullcontext()
        flow, parts = self.flow, self.facts[step.layer].parts
        assert flow is not None
        assert parts is not None  # P105
        return partly(self.layer(step.layer), parts.mlp, mlp.expand(flow.moment.rows, -1))

    def _ran(self, size: float, active: Decision) -> None:
        flow = self.flow
        assert flow is not None
        if isinstance(active, bool):
            flow.depth += size if active else 0.0
            return
        if flow.extra is None:
            flow.extra = torch.zeros(flow.moment.rows, flow.moment.tokens)
        flow.extra += size * active.cpu()


def _view(value: Any, slot: int, take: Take) -> Any:
    return slot_view(value, slot, take=take) if isinstance(value, Cache) else value
