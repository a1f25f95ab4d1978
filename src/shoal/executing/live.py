"""Run a plan on a live model and take it away again; the model keeps its class, its names and its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from shoal.deciding.deciding import Deciding, chosen, require_tensors
from shoal.deciding.gates import Policy
from shoal.deciding.place import decides
from shoal.deciding.trace import Trace
from shoal.errors import PlanError
from shoal.executing.conductor import PlannedList
from shoal.executing.paged import guard_paged, paging_obstacle
from shoal.executing.weights import refuse_unlike, shapes_in
from shoal.models.kinds import is_causal
from shoal.models.opened import open_model
from shoal.models.order import refuse_order
from shoal.models.stacks import Stack, unwrap
from shoal.plan import Plan, format_steps, parse_plan, require
from shoal.plan.steps import Step, kv_source, runs


class Running:
    """A plan at work on a model. `restore()` puts the model back, bit for bit; a second call does nothing."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        swapped: list[tuple[Stack, nn.ModuleList]],
        deciding: Deciding | None = None,
        unguard: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.plan = model, plan
        self.swapped = swapped
        self.deciding = deciding
        self._unguard = unguard

    @property
    def policy(self) -> Policy | None:
        """Who decides, if anybody does."""
        return None if self.deciding is None else self.deciding.policy

    @property
    def trace(self) -> Trace:
        """How deep each token went. Raises P125 when nothing is decided at run time."""
        if self.deciding is None:
            raise PlanError("this plan runs without a policy, so there is no trace; give policy=", code="P125")
        return self.deciding.trace

    @property
    def prompt(self) -> int | None:
        """In forwards with an empty cache, columns from this one on count as generated; None: the whole is a prompt.

        Set it to score given text as if the model had written it under the policy.
        """
        return None if self.deciding is None or self.deciding.conductor is None else self.deciding.conductor.prompt

    @prompt.setter
    def prompt(self, length: int | None) -> None:
        if self.deciding is not None and self.deciding.conductor is not None:
            self.deciding.conductor.prompt = length

    def restore(self) -> None:
        """Take the plan away."""
        if self.deciding is not None:
            self.deciding.remove()
        for stack, original in self.swapped:
            setattr(stack.owner, stack.attr, original)
        if self.swapped:
            self._unguard()
        self.swapped = []


def apply(
    model: nn.Module,
    plan: Plan | str,
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    policy: Policy | str | None = None,
) -> Running:
    """Run `plan` on `model` until `restore()` is called on the result.

    `model`: a transformers model, also under PEFT or with accelerate hooks; only its list of layers is exchanged.
    `plan`: a Plan, or depth notation. `weights`: tensors that the plan names, as `ID.weight`, `ID.bias` (maps, [hidden,
    hidden] and [hidden]) or `ID.PARAMETER` (replaced layers); they are brought to the model's dtype and device.
    `policy`: who decides at gates and exits, as `exit:confidence=0.9` (`shoal ls policies`) or a `Policy`; it puts
    gates into a plan that has none, and the handle's `trace` says how deep each token went.
    Raises `PlanError` (P1xx) when the plan is not legal here, P109 for KV sharing beside an encoder, P122 when another
    plan is running already, P124 for replaced layers of a model that accelerate offloads, P125 for gates and exits
    without a policy, P126 for an order in which the family's layers cannot run, P129 for own tensors that their layer
    has no place for, P130 to P138 for what a policy cannot decide on this model.
    """
    inner = unwrap(model)
    stacks = open_model(inner).stacks
    if any(isinstance(stack.layers, PlannedList) for stack in stacks):
        raise PlanError("another plan is running on this model; restore it first", code="P122")
    spec = open_model(inner).spec
    if isinstance(plan, str):
        plan = parse_plan(plan, Plan.identity(spec))
    shapes = {name: tuple(t.shape) for name, t in (weights or {}).items()}
    layers = shapes_in(stacks)
    require(plan, spec, shapes, layers)
    who = None if policy is None else chosen(policy, plan, spec)
    if who is not None:
        require_tensors(who, weights)
        plan = require(who.plan, spec, shapes, layers)
    for stack in stacks:
        refuse_order(stack, tuple(run.layer for run in runs(plan.steps(stack.name))))
        _refuse_offloaded(stack, plan.steps(stack.name))
        refuse_unlike(stack, plan.steps(stack.name), weights or {})
        if who is None:
            _refuse_undecided(plan.steps(stack.name))
        if stack.name == "decoder" and not is_causal(inner) and inner.config.is_encoder_decoder:
            _refuse_shared(plan.steps(stack.name))
    swapped, deciding = [], None
    for stack in stacks:
        like = next(stack.layer(0).parameters())
        place = None if like.is_meta else like.device
        own = {
            name: t.to(device=place, dtype=like.dtype if t.is_floating_point() else None)
            for name, t in (weights or {}).items()
        }
        deciding = None if who is None else Deciding(inner, spec, who, own)
        original, steps = stack.layers, plan.steps(stack.name)
        planned = PlannedList(
            stack, open_model(inner).facts(stack.name), steps, own, deciding.conduct if deciding else None
        )
        setattr(stack.owner, stack.attr, planned)
        swapped.append((stack, original))
    unpaged = None if not is_causal(inner) else paging_obstacle(plan.steps()) if who is None else "policy"
    return Running(inner, plan, swapped, deciding, guard_paged(inner, unpaged))


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


def _refuse_undecided(steps: tuple[Step, ...]) -> None:
    """A gate that nobody decides would run its step in silence: say so instead."""
    for step in steps:
        if decides((step,)):
            raise PlanError(
                f"step {format_steps((step,))} is decided at run time by a policy, and none is given; name one (shoal "
                "ls policies), or write the plan without gates and exits",
                code="P125",
            )


@contextmanager
def running(
    model: nn.Module,
    plan: Plan | str,
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    policy: Policy | str | None = None,
) -> Iterator[Running]:
    """`with running(model, plan): ...` - the same as `apply`, restored at the end whatever happens."""
    handle = apply(model, plan, weights, policy=policy)
    try:
        yield handle
    finally:
        handle.restore()
