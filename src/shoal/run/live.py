"""Run a plan on a live model and take it away again; the model keeps its class, its names and its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from shoal.errors import PlanError
from shoal.models.inspect import inspect
from shoal.models.kinds import is_causal
from shoal.models.order import refuse_order
from shoal.models.probe import probe
from shoal.models.stacks import Stack, find_stacks, unwrap
from shoal.plan import Exit, Map, Plan, format_steps, parse_plan, require
from shoal.plan.steps import Step, runs
from shoal.run.conductor import PlannedList


class Running:
    """A plan at work on a model. `restore()` puts the model back, bit for bit; a second call does nothing."""

    def __init__(self, model: nn.Module, plan: Plan, swapped: list[tuple[Stack, nn.ModuleList]]) -> None:
        self.model, self.plan = model, plan
        self.swapped = swapped

    def restore(self) -> None:
        """Take the plan away."""
        for stack, original in self.swapped:
            setattr(stack.owner, stack.attr, original)
        self.swapped = []


def apply(model: nn.Module, plan: Plan | str, weights: Mapping[str, torch.Tensor] | None = None) -> Running:
    """Run `plan` on `model` until `restore()` is called on the result.

    `model`: a transformers model, also under PEFT or with accelerate hooks; only its list of layers is exchanged.
    `plan`: a Plan, or depth notation. `weights`: tensors that the plan names, as `ID.weight`, `ID.bias` (maps, [hidden,
    hidden] and [hidden]) or `ID.PARAMETER` (replaced layers); they are brought to the model's dtype and device.
    Raises `PlanError` (P1xx) when the plan is not legal here, P109 for KV sharing beside an encoder, P122 when another
    plan is running already, P124 for replaced layers of a model that accelerate offloads, P125 for gates and exits,
    which need a policy, P126 for an order in which the family's layers cannot run.
    """
    inner = unwrap(model)
    stacks = find_stacks(inner)
    if any(isinstance(stack.layers, PlannedList) for stack in stacks):
        raise PlanError("another plan is running on this model; restore it first", code="P122")
    spec = inspect(inner)
    if isinstance(plan, str):
        plan = parse_plan(plan, Plan.identity(spec))
    require(plan, spec, {name: tuple(t.shape) for name, t in (weights or {}).items()})
    for stack in stacks:
        refuse_order(stack, tuple(run.layer for run in runs(plan.steps(stack.name))))
        _refuse_offloaded(stack, plan.steps(stack.name))
        _refuse_undecided(plan.steps(stack.name))
        if stack.name == "decoder" and not is_causal(inner) and inner.config.is_encoder_decoder:
            _refuse_shared(plan.steps(stack.name))
    swapped = []
    for stack in stacks:
        like = next(stack.layer(0).parameters())
        place = None if like.is_meta else like.device
        own = {name: t.to(device=place, dtype=like.dtype) for name, t in (weights or {}).items()}
        original = stack.layers
        setattr(stack.owner, stack.attr, PlannedList(stack, probe(inner, stack), plan.steps(stack.name), own))
        swapped.append((stack, original))
    return Running(inner, plan, swapped)


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
        if run.kv.read is not None:
            raise PlanError(
                f"decoder layer {run.layer} also attends to the encoder and needs a row of the KV cache for that, "
                f"so it cannot share the KV of layer {run.kv.read}; write it without @",
                code="P109",
            )


def _refuse_undecided(steps: tuple[Step, ...]) -> None:
    """A gate that nobody decides would run its step in silence: say so instead."""
    for step in steps:
        gated = [run for run in runs((step,)) if run.gate is not None]
        if gated or isinstance(step, Exit) or (isinstance(step, Map) and step.gate is not None):
            raise PlanError(
                f"step {format_steps((step,))} is decided at run time by a policy, and this version has none; "
                "write the plan without gates and exits to run it",
                code="P125",
            )


@contextmanager
def running(model: nn.Module, plan: Plan | str, weights: Mapping[str, torch.Tensor] | None = None) -> Iterator[Running]:
    """`with running(model, plan): ...` - the same as `apply`, restored at the end whatever happens."""
    handle = apply(model, plan, weights)
    try:
        yield handle
    finally:
        handle.restore()
