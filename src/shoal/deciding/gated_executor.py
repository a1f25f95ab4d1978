"""The executor of plans in which a policy decides while the model runs.

For each step there are three cases. All tokens need it: it runs as in any plan. None does: it is not called, and its
row of the cache gets what the fill says. Some do: it is called for all and the others keep their state, which is right
and saves nothing (the trace calls it simulated). A decision with a weight that learns calls the layer for all, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, assert_never

import torch

from shoal.deciding.asked import refuse_asked_of_policy
from shoal.deciding.decisions import (
    Decision,
    Reduced,
    Soft,
    and_not,
    collapse_uniform,
    hard_of,
    logical_and,
    logical_not,
    select,
    taken,
    weight_of,
    weighted,
)
from shoal.deciding.exit_view import ExitView
from shoal.deciding.filling_executor import FillingExecutor, Known
from shoal.deciding.forward import ForwardView, GatedForward
from shoal.deciding.kv_state import kv_state_of, past_of
from shoal.deciding.learning import Learning
from shoal.deciding.masks import real_columns
from shoal.deciding.mlp_for_some import around_mlp
from shoal.deciding.mlp_input import MlpInput
from shoal.deciding.policy import Policy
from shoal.errors import PlanError
from shoal.executing.calls import Call, cache_of, hidden_of
from shoal.executing.checkpointed import Around
from shoal.executing.layer_list import LayerProxyList
from shoal.executing.weights import Tensors
from shoal.models.examine import StackFacts
from shoal.models.stacks import Stack
from shoal.plan import Exit, Map, Parallel, Run, Step
from shoal.plan.price import layers_run


class GatedExecutor(FillingExecutor):
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
        super().__init__(planned, stack, facts, steps, weights, known)
        self.policy, self.heads = policy, known.heads
        self.owner = policy
        self.unpaged = "policy"
        if any(isinstance(step, Exit) for step in steps) or self.copied or policy.watches:
            self.passthrough = [False] * stack.depth
        self.passthrough[-1] = False  # where a forward ends
        self.sizes = {at: layers_run((step,)) for at, step in enumerate(steps) if isinstance(step, Run)}
        self.prompt: int | None = None
        self.written: torch.Tensor | None = None
        """See `ForwardView.written`."""
        self.inputs: tuple[torch.Tensor | None, Any] = (None, None)
        """Ids and mask that the model was called with."""
        self.last: ForwardView | None = None
        """The forward that is under way, or was last."""
        self.learning: Learning | None = None
        """What the policy is told of the training step that is under way, if it is trained."""

    def refuse_asked(self, settings: Any, given: Mapping[str, Any]) -> None:
        super().refuse_asked(settings, given)
        refuse_asked_of_policy(settings)

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

    def _begin(self, call: Call) -> GatedForward:
        hidden, cache = hidden_of(call), cache_of(call)
        rows, tokens = hidden.shape[-3], hidden.shape[-2]
        state = kv_state_of(cache, self.policy, len(self.rows), rows)
        past = past_of(cache)
        state.reach(past, tokens)
        ids, mask = self.inputs
        real = real_columns(mask, past, tokens)
        if self.learning is not None:
            self.learning.begin()
        view = self.last = ForwardView(
            rows, tokens, past, self.prompt, real, memory=state.memory, tensors=self.weights, learning=self.learning,
            prepared=self.known.prepared, written=self.written,
        )  # fmt: skip
        self.trace.begin(past, rows)
        if self.heads is not None:
            self.heads.answers_for([], {})
        return GatedForward(view=view, cache=cache, kv_state=state, ids=ids)

    def _end(self, hidden: torch.Tensor) -> torch.Tensor:
        forward, counts = self._forward, self.trace.counts
        if self.heads is not None:
            self.heads.answers_for(forward.heads, forward.behind)
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
        forward, heads = self._forward, self.heads
        unit = None if heads is None else partial(heads.unit, step.head)
        read = hidden if heads is None else heads.summed(step.head, hidden, forward.behind)
        view = ExitView(read, forward.before, partial(self.read, step.head), unit)
        answer = self.policy.should_exit(step, forward.view, view) if step.gate is not None else True
        leaves = hard_of(answer)
        new = collapse_uniform(and_not(leaves, forward.left))
        if new is False and not isinstance(answer, Soft):
            return hidden
        state = read if heads is None else heads.lens(step.head, read)
        if isinstance(answer, Soft):
            self._require_one_head(step)
            forward.give(answer.weight, and_not(logical_not(leaves), forward.left), state)
        if new is not False:
            forward.leave(new, state, step.head)
        return hidden

    def _require_one_head(self, step: Exit) -> None:
        if self.heads is not None and self.heads.owned(step.head):
            raise PlanError(
                f"exit {step.name} has the head {step.head} of its own, and a weighted sum of states is read by one "
                "head alone; give the exit a lens, or the model's head",
                code="P156",
            )

    def read(self, head: str, states: torch.Tensor, columns: slice) -> torch.Tensor:
        """The logits of hidden states at an exit with this head, which are those of these columns of the forward;
        counted as looks."""
        readout, heads = self.known.readout, self.heads
        assert readout is not None
        self.trace.counts.heads += states.shape[-3] * states.shape[-2]
        if heads is None:
            return readout(states)
        behind = {} if not heads.depths(head) else {n: h[..., columns, :] for n, h in self.now.behind.items()}
        with heads.only(head, behind):
            return readout(heads.lens(head, states))

    def _instead(self, step: Run, hidden: torch.Tensor) -> torch.Tensor:
        """The states of tokens that a run is not for; who has left an exit keeps its own."""
        left = self._forward.left
        if step.gate is None or left is True:
            return hidden
        return select(left, hidden, self.policy.instead(step, self._forward.view, hidden))

    def _mixed(
        self, step: Run, stored: Decision, weight: torch.Tensor | None, out: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """What a run made for who ran it, and what the others keep."""
        if stored is True and weight is None:
            return out
        others = self._instead(step, hidden)
        return select(stored, out, others) if weight is None else weighted(weight, out, others)

    def _decided(self, position: int, step: Run, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Ask who runs a layer, or its mlp; call it for them, or fill its row of the cache."""
        forward, policy = self._forward, self.policy
        answer, reduced = self._asked(step, hidden)
        asked, learns = hard_of(answer), isinstance(answer, Soft) and answer.learns
        mlp = asked if policy.leaves_out == "mlp" and step.gate is not None else None
        active = collapse_uniform(and_not(asked if mlp is None else True, forward.left))
        weight = weight_of(answer, active if mlp is None else logical_and(asked, active), forward.left)
        if isinstance(active, torch.Tensor):
            active = active.to(hidden.device)  # the layers of one model may be on several devices
        self._count(self.sizes[position], active, mlp, reduced)
        uses = () if reduced is None else (partial(reduced.around, self.runner.layer_of(step)),)
        gated, fill = self.gated[position], self.fills[step.kv.fill]
        reads = answer.reads if isinstance(answer, Soft) else None
        carried, hidden = hidden, hidden if reads is None else reads.to(hidden.device)
        if active is False and learns and forward.left is not True:
            active = hidden.new_zeros(forward.view.rows, forward.view.tokens, dtype=torch.bool)
        if active is False:
            self._skipped(position, step, hidden, call, uses)
            return carried if reads is not None else self._instead(step, hidden)
        # whoever left and is to run later anyway may as well run now: its state goes on, its answer is kept
        stored = True if fill.runs_all else active
        run = replace(step, part="attention") if mlp is False and not learns else step
        watched = policy.watches and active is True
        seen = MlpInput(self.runner, step) if watched and policy.watched == "mlp" and mlp is not None else None
        some = mlp if weight is None or mlp is None or run.part != step.part else weight
        self.around = around_mlp(self.runner.layer_of(step), self.facts[step.layer].parts, some, forward.view.rows)
        self.around += (seen.noted,) if seen is not None and run.part == step.part else ()
        self.around += uses if run.part == step.part else ()
        try:
            alone = partial(self._with, None, run, (position, 0), hidden, call)
            out = self._called(run, gated, hidden, call, stored) if gated else alone()
        finally:
            self.around = ()
        if reads is not None and weight is not None:
            out = taken(stored, weight, out, hidden, carried)
        else:
            out = self._mixed(step, stored, None if mlp is not None else weight, out, hidden)
        self._count_spared(position, None if run.part != step.part else reduced)
        forward.before = hidden
        if watched:
            policy.after_run(step, forward.view, hidden if seen is None else seen.of(run, hidden, out, call), out)
        return out

    def _asked(self, step: Run, hidden: torch.Tensor) -> tuple[Decision | Soft, Reduced | None]:
        """Who runs, and what of it where that is not all."""
        answer = True if step.gate is None else self.policy.should_run(step, self._forward.view, hidden)
        return (answer.answer, answer) if isinstance(answer, Reduced) else (answer, None)

    def _skipped(self, position: int, step: Run, hidden: torch.Tensor, call: Call, uses: tuple[Around, ...]) -> None:
        """Nobody runs it: its row of the cache gets what the fill says, which is the same when others run it."""
        gated = self.gated[position]
        if gated is None:
            return
        self.around = uses
        try:
            self.fills[step.kv.fill].skipped(gated, self._forward, hidden, call)
        finally:
            self.around = ()

    def _count(self, size: float, active: Decision, mlp: Decision | None, reduced: Reduced | None) -> None:
        """What tokens run of a layer of this size, or of a part of one, goes to the trace."""
        forward, share = self._forward, None if reduced is None else reduced.share
        decided, where = (size, active) if mlp is None else (0.5, logical_and(mlp, active))
        if mlp is not None:
            forward.ran(size - 0.5, active)
        forward.ran(decided, where, share)

    def _count_spared(self, position: int, reduced: Reduced | None) -> None:
        """What the call that is over computed less than a whole layer goes to the trace."""
        if reduced is not None and reduced.spared():
            size = 0.5 if self.policy.leaves_out == "mlp" else self.sizes[position]
            self.trace.counts.spared += size * float((1 - reduced.share).expand(self._forward.view.rows, -1).sum())
