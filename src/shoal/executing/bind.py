"""A plan bound to an opened model: checked once, then put on and taken away in microseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from shoal.errors import PlanError
from shoal.executing.executor import Executor
from shoal.executing.layer_list import PlannedList
from shoal.executing.paged import guard_paged
from shoal.executing.weights import Tensors, refuse_unlike, shapes_in
from shoal.models.kinds import is_causal
from shoal.models.lists import Stack
from shoal.models.opened import OpenedModel, open_model
from shoal.models.order import refuse_order
from shoal.plan import Plan, format_steps, parse_plan, require
from shoal.plan.steps import Step, decides, kv_source, runs
from shoal.plan.tensors import shapes_of

MakeExecutor = Callable[[PlannedList, Stack, tuple[Step, ...]], Executor]
"""From the list that stands in for a stack's layers, the stack and its steps to what runs them."""


class BoundPlan:
    """A plan that is known to run on a model, ready to be put on it. Between two uses the model is as it was."""

    def __init__(self, opened: OpenedModel, plan: Plan, tensors: Tensors, make: MakeExecutor | None = None) -> None:
        """Checks nothing: see `bind`. `make`: what runs a stack's steps, where it is no plain `Executor`."""
        self.opened, self.plan, self.tensors = opened, plan, tensors
        self._lists: list[tuple[Stack, PlannedList]] = []
        self._before: list[nn.ModuleList] = []
        self._unguard: Callable[[], None] = lambda: None
        for stack in opened.stacks:
            planned, steps = PlannedList(stack), plan.steps(stack.name)
            executor = (
                Executor(planned, stack, opened.facts(stack.name), steps, tensors)
                if make is None
                else make(planned, stack, steps)
            )
            planned.lead_to(executor)
            self._lists.append((stack, planned))
        self._unpaged = self.executor().unpaged if is_causal(opened.model) else None

    @property
    def model(self) -> nn.Module:
        """The model without a PEFT wrapper."""
        return self.opened.model

    def executor(self, stack: str | None = None) -> Executor:
        """What runs the steps of one stack; without a name of the decoder, or of the first."""
        name = self.plan.stack_name(stack)
        found: Executor = next(planned.executor for one, planned in self._lists if one.name == name)
        return found

    def use(self, tensors: Tensors) -> None:
        """Run with these tensors from now on: other values of those that the plan was bound with, by the same names.
        Their shapes are not checked again."""
        self.tensors = tensors
        for _, planned in self._lists:
            planned.executor.use(tensors)

    def enter(self) -> None:
        """Put the plan on the model. Raises P122 when another plan is running there."""
        refuse_second_plan(self.opened)
        self._before = [stack.layers for stack, _ in self._lists]
        for stack, planned in self._lists:
            stack.owner._modules[stack.attr] = planned
        self._unguard = guard_paged(self.model, self._unpaged)

    def leave(self) -> None:
        """Take the plan away; nothing happens when it is not there."""
        for (stack, _), before in zip(self._lists, self._before, strict=False):
            stack.owner._modules[stack.attr] = before
        if self._before:
            self._unguard()
        self._before = []

    @contextmanager
    def running(self) -> Iterator[BoundPlan]:
        """`with bound.running(): ...` - on the model inside, away behind it, whatever happens."""
        self.enter()
        try:
            yield self
        finally:
            self.leave()


def bind(
    model: nn.Module | OpenedModel, plan: Plan | str | None = None, weights: Mapping[str, torch.Tensor] | None = None
) -> BoundPlan:
    """Check `plan` for `model` and make all that its runs need; the model is not touched.

    `plan`: a Plan or depth notation; None for the whole model. `weights`: tensors that the plan names, as `running`
    takes them. Raises `PlanError` (P1xx) when the plan is not legal here, see `shoal.live.apply`.
    """
    opened = open_model(model)
    if plan is None or isinstance(plan, str):
        identity = Plan.identity(opened.spec)
        plan = identity if plan is None else parse_plan(plan, identity)
    tensors = dict(weights or {})
    require_legal(opened, plan, tensors)
    _refuse_undecided(plan)
    return BoundPlan(opened, plan, tensors)


def _refuse_undecided(plan: Plan) -> None:
    """A gate that nobody decides would run its step in silence: say so instead."""
    for step in (step for _, steps in plan.stacks for step in steps):
        if decides((step,)):
            raise PlanError(
                f"step {format_steps((step,))} is decided at run time by a policy, and none is given; name one (shoal "
                "ls policies), or write the plan without gates and exits",
                code="P125",
            )


def refuse_second_plan(opened: OpenedModel) -> None:
    """Raise P122 when a plan is running on the model."""
    if any(isinstance(stack.layers, PlannedList) for stack in opened.stacks):
        raise PlanError("another plan is running on this model; restore it first", code="P122")


def require_legal(opened: OpenedModel, plan: Plan, tensors: Tensors) -> Plan:
    """The plan itself when it is legal on this model with these tensors. Raises what `check` finds, P129 for tensors of
    another kind than their layer holds, P126 for an order in which the family's layers cannot run, P124 for replaced
    layers that accelerate offloads, P109 for KV sharing beside an encoder."""
    require(plan, opened.spec, shapes_of(tensors), shapes_in(opened.stacks))
    beside_encoder = not is_causal(opened.model) and opened.model.config.is_encoder_decoder
    for stack in opened.stacks:
        steps = plan.steps(stack.name)
        refuse_order(stack, tuple(run.layer for run in runs(steps)))
        _refuse_offloaded(stack, steps)
        refuse_unlike(stack, steps, tensors)
        if stack.name == "decoder" and beside_encoder:
            _refuse_shared(steps)
    return plan


def _refuse_offloaded(stack: Stack, steps: tuple[Step, ...]) -> None:
    for run in runs(steps):
        if run.weights is not None and any(p.is_meta for p in stack.layer(run.layer).parameters()):
            raise PlanError(
                f"layer {run.layer} is offloaded, and accelerate would put its own weights back over {run.weights!r}; "
                "load the model without offloading to run replaced layers",
                code="P124",
            )


def _refuse_shared(steps: tuple[Step, ...]) -> None:
    for run in runs(steps):
        if run.layer_sources:
            raise PlanError(
                f"decoder layer {run.layer} also attends to the encoder and needs a row of the KV cache for that, "
                f"so it cannot share the KV of layer {kv_source(run)}; write it without @",
                code="P109",
            )
