"""A policy bound to a model: what it must know is found out while the model is whole, then it listens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shoal.deciding.asked import OneThread, prompt_length
from shoal.deciding.decidable import require_decidable, require_masks
from shoal.deciding.exit_units import require_units
from shoal.deciding.filling_executor import Known
from shoal.deciding.gated_executor import GatedExecutor
from shoal.deciding.kv_projection import projections_of
from shoal.deciding.layer_arguments import Arguments
from shoal.deciding.policy import Policy
from shoal.deciding.trace import Trace, count_calls
from shoal.executing.asked import stand_ins
from shoal.executing.bind import BoundPlan
from shoal.executing.exit_heads import heads_of
from shoal.executing.exit_readout import Readout
from shoal.executing.layer_list import LayerProxyList
from shoal.executing.weights import Tensors
from shoal.models.calls import logits_in, named_arguments
from shoal.models.examine import StackFacts
from shoal.models.opened import OpenedModel, open_model
from shoal.models.stacks import Stack
from shoal.plan import Plan, Spec, Step
from shoal.plan.select import exits
from shoal.plan.steps import runs


def bind_policy(opened: OpenedModel, plan: Plan, weights: Tensors, policy: Policy) -> tuple[BoundPlan, BoundPolicy]:
    """A plan that its policy decides about, legal on this model, and the policy, which listens until `remove()`."""
    deciding = BoundPolicy(opened.model, opened.spec, policy, weights)

    def make(planned: LayerProxyList, stack: Stack, steps: tuple[Step, ...]) -> GatedExecutor:
        return deciding.make_executor(planned, stack, opened.facts(stack.name), steps, weights)

    try:
        return BoundPlan(opened, plan, weights, make), deciding
    except BaseException:
        deciding.remove()
        raise


class BoundPolicy:
    """A policy at work: its executor's trace, and the hooks that count and listen. `remove()` takes the hooks away."""

    def __init__(self, model: Any, spec: Spec, policy: Policy, weights: Tensors) -> None:
        """Probes the model, which must be whole, for what this policy's gates, exits and fills need.

        Raises P13x for what cannot be decided on this model, P137 when a fill needs a mask that the layers are not
        given.
        """
        self.model, self.policy, self.weights = model, policy, weights
        self.opened = open_model(model)
        self.stack: Stack = self.opened.stack()
        self.facts = self.opened.facts(self.stack.name)
        require_decidable(policy, spec, model, self.facts)
        require_units(policy.plan, weights, policy.by)
        policy.check_tensors(weights, spec)
        self.known = self._found(policy.plan.steps())
        self.executor: GatedExecutor | None = None
        self.thread = OneThread()
        self._removes: list[Callable[[], None]] = []

    def make_executor(
        self, planned: LayerProxyList, stack: Stack, facts: StackFacts, steps: tuple[Step, ...], weights: Tensors
    ) -> GatedExecutor:
        """The executor for `planned`; from now on the hooks are there."""
        executor = GatedExecutor(planned, stack, facts, steps, weights, self.policy, self.known)
        self.executor = executor
        self._removes.append(
            count_calls(executor.runner.called(steps), self.facts.layers, executor.trace.counts, self._paused)
        )
        if self.known.heads is not None:
            self.known.heads.put()
            self._removes.append(self.known.heads.remove)
        listen = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._removes.append(listen.remove)
        self._removes.append(self.model.register_forward_hook(self._forward_ended, always_call=True).remove)
        for one in stand_ins(self.model, {"generate": self._generate}):
            one.put()
            self._removes.append(one.take_away)
        if self.policy.reads_logits:
            self._removes.append(self.model.register_forward_hook(self._after_forward).remove)
        return executor

    @property
    def trace(self) -> Trace:
        """How deep each token went."""
        assert self.executor is not None
        return self.executor.trace

    @property
    def memory(self) -> dict[str, Any]:
        """What the policy remembers of the sequences that the newest forward was of."""
        assert self.executor is not None
        return {} if self.executor.last is None else self.executor.last.memory

    def remove(self) -> None:
        """Take every hook away; a second call does nothing."""
        while self._removes:
            self._removes.pop()()

    def _found(self, steps: tuple[Step, ...]) -> Known:
        fills = {run.kv.fill for run in runs(steps)}
        placed = exits(steps)
        known = Known(prepared=self.policy.prepare(self.opened))
        if fills & {"mask", "defer"}:
            known.arguments = self.opened.remember("arguments", lambda: Arguments(self.model, self.stack))
            require_masks(steps, known.arguments)
        if "project" in fills:
            known.projections = projections_of(self.opened)
        if placed:
            known.readout = Readout(self.opened, self._ending)
        known.heads = heads_of(self.opened, self.stack, steps, self.weights, self._paused)
        return known

    def _ending(self, state: torch.Tensor) -> Any:
        assert self.executor is not None
        return self.executor.between(self.executor.depth, state)

    def _paused(self) -> bool:
        return self.executor is not None and self.executor.paused

    def _listening(self) -> GatedExecutor | None:
        """The executor, if the forward that begins or ends is one of the plan's own."""
        executor = self.executor
        return None if executor is None or executor.paused or executor.reading_out else executor

    def _generate(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], None] | None:
        """Until `generate` is done, passes without a cache, and those in which prompt and guessed tokens come together,
        know where the prompt ends. A model that assists itself goes by the first call."""
        executor = self.executor
        if executor is None or executor.paused or executor.prompt is not None:
            return None
        executor.prompt = prompt_length(args, kwargs)
        return self._generated

    def _generated(self, _: Any) -> None:
        assert self.executor is not None
        self.executor.prompt = None

    def _before_forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (executor := self._listening()) is not None:
            self.thread.enter()
            given = named_arguments(self.model, args, kwargs)
            executor.inputs = given.get("input_ids"), given.get("attention_mask")

    def _forward_ended(self, *_: Any) -> None:
        if self._listening() is not None:
            self.thread.leave()

    def _after_forward(self, _: nn.Module, __: Any, out: Any) -> None:
        if (executor := self._listening()) is not None and executor.last is not None:
            self.policy.after_forward(executor.last, logits_in(out)[:, -1])
