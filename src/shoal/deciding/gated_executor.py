"""The executor of plans in which a policy decides while the model runs.

For each step there are three cases. All tokens need it: it runs as in any plan. None does: it is not called, and its
row of the cache gets what the fill says. Some do: it is called for all and the others keep their state, which is right
and saves nothing (the trace calls it simulated).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, assert_never

import torch
from transformers.cache_utils import Cache

from shoal.deciding.asked import refuse_asked_of_policy
from shoal.deciding.decisions import Decision, and_not, collapse_uniform, logical_and, select
from shoal.deciding.exit_heads import Heads
from shoal.deciding.exit_readout import Readout
from shoal.deciding.exit_view import ExitView
from shoal.deciding.forward import ForwardView, GatedForward, kinds_of
from shoal.deciding.kv_fills import (
    CopiedKV,
    CopyFill,
    DeferFill,
    GatedRun,
    KVFill,
    MaskFill,
    ProjectFill,
    next_run,
)
from shoal.deciding.kv_projection import KVProjection, store_alone
from shoal.deciding.kv_state import kv_state_of, past_of
from shoal.deciding.layer_arguments import Arguments
from shoal.deciding.masks import real_columns
from shoal.deciding.mlp_for_some import around_mlp
from shoal.deciding.mlp_input import MlpInput
from shoal.deciding.policy import Policy
from shoal.deciding.trace import Trace
from shoal.executing.calls import Call, cache_of, hidden_of, with_argument
from shoal.executing.checkpointed import SharedKV
from shoal.executing.executor import Executor
from shoal.executing.layer_list import LayerProxyList
from shoal.executing.slots import PassingCache, Take, slot_view
from shoal.executing.weights import Tensors
from shoal.models.examine import StackFacts
from shoal.models.stacks import Stack
from shoal.plan import Exit, Map, Parallel, Run, Step
from shoal.plan.price import layers_run
from shoal.plan.steps import Fill, runs


@dataclass
class Known:
    """What was found out of the whole model for one policy, before its first forward."""

    arguments: Arguments | None = None
    """For masks and for late runs."""
    readout: Readout | None = None
    """For what an exit says."""
    heads: Heads | None = None
    """Those that exits have of their own."""
    projections: list[KVProjection | None] = field(default_factory=list)
    """By base layer, for the fill project."""


class GatedExecutor(Executor):
    """Asks `policy` at each gate and exit of its plan."""

    def __init__(
        self,
        planned: LayerProxyList,
        stack: Stack,
        facts: StackFacts,
        steps: tuple[Step, ...],
        weights: Tensors,
        policy: Policy,
        known: Known,
    ) -> None:
        super().__init__(planned, stack, facts, steps, weights)
        self.policy, self.known = policy, known
        self.owner = policy
        self.unpaged = "policy"
        self.kinds = kinds_of(facts)
        self.copied = {self.kinds[run.layer] for run in runs(steps) if run.kv.fill == "copy"}
        if any(isinstance(step, Exit) for step in steps) or self.copied or policy.watches:
            self.passthrough = [False] * stack.depth
        self.passthrough[-1] = False  # where a forward ends
        self.fills = self._fills({run.kv.fill for run in runs(steps)})
        single = {at: step for at, step in enumerate(steps) if isinstance(step, Run)}
        self.gated = {at: self._gated(at, run) for at, run in single.items()}
        self.sizes = {at: layers_run((run,)) for at, run in single.items()}
        self.trace = Trace(layers=layers_run(runs(steps)))
        self.prompt: int | None = None
        self.inputs: tuple[torch.Tensor | None, Any] = (None, None)
        """Ids and mask that the model was called with."""
        self.last: ForwardView | None = None
        """The forward that is under way, or was last."""

    def refuse_asked(self, settings: Any, given: Mapping[str, Any]) -> None:
        super().refuse_asked(settings, given)
        refuse_asked_of_policy(settings)

    def _fills(self, wanted: set[Fill | None]) -> dict[Fill | None, KVFill]:
        fills: dict[Fill | None, KVFill] = {None: KVFill(), "project": ProjectFill(self._project), "copy": CopyFill()}
        if self.known.arguments is not None:
            following = {at: next_run(self.steps, at) for at in range(len(self.steps))}
            fills["mask"] = MaskFill(self.known.arguments)
            fills["defer"] = DeferFill(self.known.arguments, following)
        return {name: fill for name, fill in fills.items() if name in wanted}

    @property
    def reading_out(self) -> bool:
        """Whether the stock forward runs only to make logits of a state: no forward of its own."""
        return self.segment is not None and self.segment.begin >= self.depth

    def _start(self, call: Call) -> None:
        record = self._begin(call)
        super()._start(call)
        self.now = record
        self.policy.begin(record.view)

    def _proxy_call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = super()._proxy_call(index, args, kwargs)
        if self.passthrough[index] and self.recorder is None:
            self._forward.ran(1.0, True)
        return out

    def as_layer_output(self, index: int, hidden: torch.Tensor) -> Any:
        if index == self.depth - 1:
            hidden = self._end(hidden)
        return super().as_layer_output(index, hidden)

    @property
    def _forward(self) -> GatedForward:
        assert isinstance(self.now, GatedForward)
        return self.now

    def _begin(self, call: Call) -> GatedForward:
        hidden, cache = hidden_of(call), cache_of(call)
        rows, tokens = hidden.shape[-3], hidden.shape[-2]
        state = kv_state_of(cache, self.policy, len(self.rows), rows)
        past = past_of(cache)
        state.reach(past, tokens)
        ids, mask = self.inputs
        real = real_columns(mask, past, tokens)
        view = self.last = ForwardView(rows, tokens, past, self.prompt, real, memory=state.memory)
        self.trace.begin(past, rows)
        if self.known.heads is not None:
            self.known.heads.now = []
        return GatedForward(view=view, cache=cache, kv_state=state, ids=ids)

    def _end(self, hidden: torch.Tensor) -> torch.Tensor:
        forward, counts, heads = self._forward, self.trace.counts, self.known.heads
        if heads is not None:
            heads.now = [(where, head) for where, head in forward.heads if heads.owned(head)]
        depths = forward.depths()
        counts.asked += float(depths.sum())
        counts.tokens += forward.all_tokens
        counts.projected += forward.projected
        self.trace.end(forward.ids, depths, forward.view.real)
        return forward.last_state(hidden)

    def _step(
        self, position: int, step: Step, hidden: torch.Tensor, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        left = self._forward.left
        match step:
            case Exit():
                return hidden if left is True else self._exit(step, hidden)
            case Run():
                call = (args, kwargs) if step.layer == index else self.now.calls[step.layer]
                return self._decided(position, step, hidden, call)
            case Map() | Parallel():
                if left is True:
                    return hidden
                return select(left, hidden, super()._step(position, step, hidden, index, args, kwargs))
            case _:
                assert_never(step)

    def _exit(self, step: Exit, hidden: torch.Tensor) -> torch.Tensor:
        forward, heads = self._forward, self.known.heads
        probe = None if heads is None else partial(heads.probe, step.head)
        view = ExitView(hidden, forward.before, partial(self.read, step.head), probe)
        leaves = self.policy.should_exit(step, forward.view, view) if step.gate is not None else True
        new = collapse_uniform(and_not(leaves, forward.left))
        if new is not False:
            forward.leave(new, hidden if heads is None else heads.lens(step.head, hidden), step.head)
        return hidden

    def read(self, head: str, states: torch.Tensor) -> torch.Tensor:
        """The logits of hidden states at an exit with this head; counted as looks."""
        readout, heads = self.known.readout, self.known.heads
        assert readout is not None
        self.trace.counts.heads += states.shape[-3] * states.shape[-2]
        if heads is None:
            return readout(states)
        with heads.only(head):
            return readout(heads.lens(head, states))

    def _decided(self, position: int, step: Run, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Ask who runs a layer, or its mlp; call it for them, or fill its row of the cache."""
        forward, policy = self._forward, self.policy
        asked = True if step.gate is None else collapse_uniform(policy.should_run(step, forward.view, hidden))
        mlp = asked if policy.leaves_out == "mlp" and step.gate is not None else None
        active = collapse_uniform(and_not(asked if mlp is None else True, forward.left))
        if isinstance(active, torch.Tensor):
            active = active.to(hidden.device)  # the layers of one model may be on several devices
        forward.ran(self.sizes[position] - (0.0 if mlp is None else 0.5), active)
        if mlp is not None:
            forward.ran(0.5, logical_and(mlp, active))
        gated, fill = self.gated[position], self.fills[step.kv.fill]
        if active is False:
            if gated is not None:
                fill.skipped(gated, forward, hidden, call)
            return hidden
        # whoever left and is to run later anyway may as well run now: its state goes on, its answer is kept
        called = True if fill.runs_all else active
        run = replace(step, part="attention") if mlp is False else step
        slot = self.slots.get((position, 0))
        watched = policy.watches and active is True
        seen = MlpInput(self.runner, step) if watched and policy.watched == "mlp" and mlp is not None else None
        self.around = around_mlp(self.runner.layer_of(step), self.facts[step.layer].parts, mlp, forward.view.rows)
        self.around += (seen.noted,) if seen is not None and mlp is not False else ()
        try:
            out = self._called(run, gated, hidden, call, called) if gated else self._with(None, run, slot, hidden, call)
        finally:
            self.around = ()
        out = select(called, out, hidden)
        forward.before = hidden
        if watched:
            policy.after_run(step, forward.view, hidden if seen is None else seen.of(run, hidden, out, call), out)
        return out

    def _gated(self, position: int, step: Run) -> GatedRun | None:
        """None for a run that stores no keys and values."""
        slot, fact = self.slots.get((position, 0)), self.facts[step.layer]
        if slot is None or fact.keys is None or step.part == "mlp":
            return None
        return GatedRun(step, position, slot, fact, self.kinds[step.layer])

    def _called(self, run: Run, gated: GatedRun, hidden: torch.Tensor, call: Call, active: Decision) -> torch.Tensor:
        forward = self._forward
        made = self.fills[run.kv.fill].before_run(gated, forward, active, hidden, call)
        take = made.take
        if take is None and gated.kind in self.copied:
            take = CopiedKV(gated, forward)
        size = layers_run((run,))
        self.trace.counts.late += int(size * made.late * forward.view.rows)
        return made.own(self._with(take, run, gated.slot, made.hidden, made.call))

    def _project(self, gated: GatedRun, hidden: torch.Tensor, call: Call) -> bool:
        """Store what the layer makes of this state; whether no more than that was computed."""
        run = gated.run
        # what comes out of the layer means nothing: nobody is told, and nothing of it is handed on
        extra, carried, recorder = self.now.extra, self.now.carried, self.recorder
        self.recorder = None
        projection = self.known.projections[run.layer]
        # adapters may have put another layer there since it was looked at
        alone = projection is not None and projection.layer is self.runner.layer_of(run)
        try:
            if projection is None or not alone:
                self._with(None, run, gated.slot, hidden, call)
            else:
                with projection.of(hidden):
                    self._with(store_alone, run, gated.slot, hidden, call)
        finally:
            self.recorder = recorder
        self.now.extra, self.now.carried = extra, carried
        return alone

    def _with(self, take: Take | None, run: Run, slot: int | None, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Run the step over a cache that does as `take` says."""
        if take is None or slot is None:
            return self._run(run, slot, hidden, run.layer, *call)
        args, kwargs = call
        swapped = tuple(_view(a, slot, take) for a in args), {k: _view(v, slot, take) for k, v in kwargs.items()}
        at = self.facts[run.layer].cache_at
        if at is not None and cache_of(swapped) is None:
            swapped = with_argument(swapped, at, slot_view(PassingCache(), slot, take=take))
        self.taken = take
        try:
            return self._run(run, slot, hidden, run.layer, *swapped)
        finally:
            self.taken = None

    taken: Take | None = None

    def _cache_for(self, run: Run, slot: int | None, cache: Cache) -> Cache:
        return super()._cache_for(run, slot, cache) if self.taken is None else cache

    def _shared_kv(self, run: Run) -> SharedKV | None:
        return self.taken.shared() if isinstance(self.taken, CopiedKV) else super()._shared_kv(run)


def _view(value: Any, slot: int, take: Take) -> Any:
    return slot_view(value, slot, take=take) if isinstance(value, Cache) else value
