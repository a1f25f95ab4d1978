"""Run a plan on a live model and take it away again; the model keeps its class, its names and its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from shoal.deciding.bound_policy import BoundPolicy, bind_policy
from shoal.deciding.learning import Learning
from shoal.deciding.policy import Policy
from shoal.deciding.policy_text import policy_for, require_tensors
from shoal.deciding.trace import Trace
from shoal.errors import PlanError
from shoal.executing.bind import BoundPlan, bind, modules_for, refuse_graphs, refuse_second_plan, require_legal
from shoal.executing.later import LaterExecutor, Passes
from shoal.executing.modules import ModuleTensors, take_modules_away
from shoal.executing.weights import Tensors, plan_and_weights
from shoal.models.load import Loaded
from shoal.models.opened import OpenedModel, open_model
from shoal.models.settings import SettingsBefore
from shoal.plan import Given, Plan


class Running:
    """A plan at work on a model. `restore()` puts the model back, bit for bit; a second call does nothing."""

    def __init__(self, bound: BoundPlan, deciding: BoundPolicy | None = None, *, owns_modules: bool = False) -> None:
        """`owns_modules`: the modules of the plan's tensors go with the plan."""
        self.bound, self.deciding, self._owns_modules = bound, deciding, owns_modules
        self._before: SettingsBefore | None = SettingsBefore(bound.model)

    @property
    def model(self) -> nn.Module:
        """The model without a PEFT wrapper."""
        return self.bound.model

    @property
    def plan(self) -> Plan:
        """What runs, with the gates and exits that a policy has put there."""
        return self.bound.plan

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
    def passes(self) -> Passes | None:
        """How often the last forward went over its new tokens, and whether that was exact; None where no layer reads a
        later one, and before the first forward."""
        executor = self.bound.executor()
        return executor.ran if isinstance(executor, LaterExecutor) else None

    @property
    def prompt(self) -> int | None:
        """In forwards with an empty cache, columns from this one on count as generated; None: the whole is a prompt.

        Set it to score given text as if the model had written it under the policy.
        """
        return None if self.deciding is None or self.deciding.executor is None else self.deciding.executor.prompt

    @prompt.setter
    def prompt(self, length: int | None) -> None:
        if self.deciding is not None and self.deciding.executor is not None:
            self.deciding.executor.prompt = length

    @contextmanager
    def paused(self) -> Iterator[Running]:
        """`with handle.paused(): ...` - the model is whole inside and runs the plan again behind it, in microseconds;
        see `BoundPlan.paused`. A policy hears nothing of what is computed there, and the trace does not count it."""
        with self.bound.paused():
            yield self

    @contextmanager
    def learning(self, step: Learning) -> Iterator[Learning]:
        """`with handle.learning(Learning(progress=0.2, seed=step)) as now: loss = model(...)` - the policy is trained:
        it sees `now` as `forward.learning`, and what it writes down in a forward is in `now.ledger` behind it."""
        executor = None if self.deciding is None else self.deciding.executor
        if executor is None:
            yield step
            return
        before, executor.learning = executor.learning, step
        try:
            yield step
        finally:
            executor.learning = before

    @property
    def tensors(self) -> Tensors:
        """The tensors that the plan names, as the next forward will find them."""
        return self.bound.tensors

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The replaced layers by the id of their tensors, where they are modules of the model; else empty."""
        return self.tensors.layers if isinstance(self.tensors, ModuleTensors) else {}

    def restore(self) -> None:
        """Take the plan away with its modules, and put back what was changed meanwhile in the model's config and
        generation config."""
        before, self._before = self._before, None
        if self.deciding is not None:
            self.deciding.remove()
        self.bound.leave()
        if self._owns_modules:
            take_modules_away(self.bound.opened)
            self._owns_modules = False
        if before is not None:
            before.put_back()


def apply(
    model: nn.Module | OpenedModel | Loaded,
    plan: Given,
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    policy: Policy | str | None = None,
    modules: bool = False,
    passes: int | None = None,
) -> Running:
    """Run `plan` on `model` until `restore()` is called on the result.

    `model`: a transformers model, also under PEFT or with accelerate hooks, or what `shoal.load` gave; only its list of
    layers is exchanged. `plan`: a Plan, depth notation, or the place of a plan.json or of a folder that Shoal wrote,
    whose weights are then taken too. `weights`: any mapping that holds the tensors that the plan names, as `ID.weight`,
    `ID.bias` (maps, [hidden, hidden] and [hidden]) or `ID.PARAMETER` (replaced layers). They are looked up at every
    use, so that a step of an optimiser is seen by the next forward, and used in the dtype and on the device of what
    they meet. `policy`: who decides at gates and exits, as `exit:confidence=0.9` (`shoal ls policies`) or a `Policy`;
    it puts gates into a plan that has none, and the handle's `trace` says how deep each token went.
    `modules`: make the plan's tensors modules of the model until then, as what learns must be, see
    `shoal.executing.modules`; `handle.layers` has the replaced layers.
    `passes`: where a layer reads one that runs later, at most so many passes over the new tokens of a forward; None: as
    many as make it exact. Fewer are an approximate prefill, and `handle.passes` says so.
    It is all or nothing: when this raises, the model is as it was.
    Raises `PlanError` (P1xx) when the plan is not legal here, P109 for KV sharing beside an encoder, P122 when another
    plan is running already, U662 when a graph is on the model, P153 for replaced layers of a model that is sharded
    already, P154 for modules that two layers would share, P124 for `modules` of layers that accelerate offloads,
    P125 for gates and exits without a policy, P126 for an order in which the family's layers cannot run, P129 for own
    tensors that their layer has no place for, P130 to P138 for what a policy cannot decide on this model,
    P163 for layers that read a later one and take no other mask, U680 for `passes` that have no use.
    """
    opened = open_model(model.model if isinstance(model, Loaded) else model)
    refuse_second_plan(opened)
    refuse_graphs(opened)
    planned, tensors = plan_and_weights(plan, Plan.identity(opened.spec), weights)
    if policy is None:
        handle = _undecided(opened, planned, tensors, modules)
    else:
        handle = _decided(opened, planned, tensors, policy, modules)
    try:
        if passes is not None:
            handle.bound.limit_passes(passes)
        handle.bound.enter()
    except BaseException:
        handle.restore()
        raise
    return handle


def _undecided(opened: OpenedModel, plan: Plan, weights: Tensors, modules: bool) -> Running:
    tensors = modules_for(opened, plan, weights) if modules else weights
    try:
        return Running(bind(opened, plan, tensors), owns_modules=modules)
    except BaseException:
        if modules:
            take_modules_away(opened)
        raise


def _decided(opened: OpenedModel, plan: Plan, weights: Tensors, policy: Policy | str, modules: bool) -> Running:
    spec = opened.spec
    who = policy_for(policy, require_legal(opened, plan, weights), spec)
    require_tensors(who, weights)
    plan = require_legal(opened, who.plan, weights)
    tensors = modules_for(opened, plan, weights) if modules else weights
    try:
        bound, deciding = bind_policy(opened, plan, tensors, who)
        return Running(bound, deciding, owns_modules=modules)
    except BaseException:
        if modules:
            take_modules_away(opened)
        raise


@contextmanager
def running(
    model: nn.Module | OpenedModel | Loaded,
    plan: Given,
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    policy: Policy | str | None = None,
    modules: bool = False,
    passes: int | None = None,
) -> Iterator[Running]:
    """`with running(model, plan): ...` - the same as `apply`, restored at the end whatever happens."""
    handle = apply(model, plan, weights, policy=policy, modules=modules, passes=passes)
    try:
        yield handle
    finally:
        handle.restore()
