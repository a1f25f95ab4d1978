"""A plan bound to an opened model: checked once, then put on and taken away in microseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shoal.errors import PlanError, UsageError
from shoal.executing.asked import stand_ins, warn_saving
from shoal.executing.executor import Executor
from shoal.executing.exit_heads import heads_of
from shoal.executing.later import LaterExecutor
from shoal.executing.layer_list import LayerProxyList
from shoal.executing.modules import ModuleTensors, put_modules, refuse_shared
from shoal.executing.paged import PagedGuard
from shoal.executing.sharded import refuse_sharded
from shoal.executing.sharing import refuse_mapless
from shoal.executing.tokens_before import refuse_unmaskable
from shoal.executing.weights import Tensors, plan_and_weights, refuse_unlike, shapes_in
from shoal.models.kinds import is_causal
from shoal.models.lists import Stack
from shoal.models.opened import OpenedModel, open_model
from shoal.models.order import refuse_order
from shoal.plan import Given, Plan, Run, require
from shoal.plan.answers import Way
from shoal.plan.capabilities import refusal
from shoal.plan.later import reads_later
from shoal.plan.steps import Step, runs, undecided
from shoal.plan.tensors import shapes_of

BETWEEN = "its attention to the encoder stands between attention and mlp"
"""Why a decoder's layer beside an encoder has no parts."""
_GRAPHS = "_shoal_graphs"
"""Where a model keeps the names of the graphs that are on it."""
MakeExecutor = Callable[[LayerProxyList, Stack, tuple[Step, ...]], Executor]
"""From the list that stands in for a stack's layers, the stack and its steps to what runs them."""


class BoundPlan:
    """A plan that is known to run on a model, ready to be put on it. Between two uses the model is as it was."""

    def __init__(self, opened: OpenedModel, plan: Plan, tensors: Tensors, make: MakeExecutor | None = None) -> None:
        """Checks nothing: see `bind`. `make`: what runs a stack's steps, where it is no plain `Executor`."""
        self.opened, self.plan, self.tensors = opened, plan, tensors
        self._lists: list[tuple[Stack, LayerProxyList]] = []
        self._before: list[nn.ModuleList] = []
        self._paused = False
        lists = {stack.name: LayerProxyList(stack) for stack in opened.stacks}
        for stack in opened.stacks:
            planned, steps = lists[stack.name], plan.steps(stack.name)
            planned.beside({name: other for name, other in lists.items() if other is not planned})
            kind = LaterExecutor if reads_later(steps) else Executor
            executor = (
                kind(planned, stack, opened.facts(stack.name), steps, tensors)
                if make is None
                else make(planned, stack, steps)
            )
            if make is None:
                executor.heads = heads_of(opened, stack, steps, tensors)
            planned.attach(executor)
            self._lists.append((stack, planned))
        # a policy's heads listen as long as the policy does
        self._heads = [] if make is not None else [one.executor.heads for _, one in self._lists]
        self.paged = PagedGuard(self.executor().unpaged if is_causal(opened.model) else None, self.executor().pages)
        checks = {
            "_validate_generation_mode": self._refuse_asked,
            "init_continuous_batching": self.paged.asked,
            "save_pretrained": warn_saving,
        }
        self._stand_ins = stand_ins(opened.model, checks)

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

    def limit_passes(self, passes: int) -> None:
        """Go over new tokens at most so often, in a plan with later sources. Raises U680 for any other plan, and for
        less than one pass."""
        executor = self.executor()
        if not isinstance(executor, LaterExecutor):
            raise UsageError(
                f"passes={passes} is for plans in which a layer reads the KV of one that runs later, as 3@29 in 0-29; "
                "leave it out",
                code="U680",
            )
        if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
            raise UsageError(f"passes={passes!r:.20} is no number of passes; write 1 or more", code="U680")
        executor.passes = passes

    def enter(self) -> None:
        """Put the plan on the model. Raises P122 when another plan is running there."""
        refuse_second_plan(self.opened)
        self._say(paused=False)
        self._before = [stack.layers for stack, _ in self._lists]
        for stack, planned in self._lists:
            stack.owner._modules[stack.attr] = planned
        self.paged.begin(self.model)
        for heads in self._heads:
            if heads is not None:
                heads.put()
        for one in self._stand_ins:
            one.put()

    def leave(self) -> None:
        """Take the plan away, for good where it is paused; nothing happens when it is not there."""
        self._say(paused=False)
        self._take_away()

    def _take_away(self) -> None:
        for (stack, _), before in zip(self._lists, self._before, strict=False):
            stack.owner._modules[stack.attr] = before
        if self._before:
            for one in self._stand_ins:
                one.take_away()
            for heads in self._heads:
                if heads is not None:
                    heads.remove()
            self.paged.end(self.model)
        self._before = []

    @contextmanager
    def paused(self) -> Iterator[BoundPlan]:
        """`with bound.paused(): ...` - the model is whole inside, as if no plan had been put on it, and runs the plan
        again behind it, whatever happens. Nothing is checked, probed or hashed.

        A plan that is not on the model, or is paused already, stays as it is. One that is taken away inside stays away.
        To be entered between forwards, not from within one. Raises P122 at the end where another plan was put on the
        model inside and is still there.
        """
        if not self._before:
            yield self
            return
        self._take_away()
        self._say(paused=True)
        try:
            yield self
        finally:
            if self._paused:
                self.enter()

    def rest(self) -> None:
        """Until the plan is put on the model, who listens on the model's own modules hears nothing."""
        self._say(paused=True)

    def _say(self, *, paused: bool) -> None:
        """Who listens on the model's own modules hears no forward of the whole model."""
        self._paused = paused
        for _, planned in self._lists:
            planned.executor.paused = paused

    def _refuse_asked(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What `generate` calls with (mode, generation config, further arguments) once it has put them together."""
        named = zip(("generation_mode", "generation_config", "generation_mode_kwargs"), args, strict=False)
        given = dict(named) | kwargs
        self.executor().refuse_asked(given.get("generation_config"), given.get("generation_mode_kwargs") or {})

    @contextmanager
    def running(self) -> Iterator[BoundPlan]:
        """`with bound.running(): ...` - on the model inside, away behind it, whatever happens."""
        was_paused = self._paused
        self.enter()
        try:
            yield self
        finally:
            self.leave()
            self._say(paused=was_paused)


def bind(
    model: nn.Module | OpenedModel, plan: Given | None = None, weights: Mapping[str, torch.Tensor] | None = None
) -> BoundPlan:
    """Check `plan` for `model` and make all that its runs need; the model is not touched.

    `plan`: a Plan, depth notation or the place of a plan.json; None for the whole model. `weights`: any mapping that
    holds the tensors that the plan names, as `running` takes them; they are looked up at every use. Raises `PlanError`
    (P1xx) when the plan is not legal here, see `shoal.live.apply`.
    """
    opened = open_model(model)
    refuse_graphs(opened)
    if not isinstance(plan, Plan):
        identity = Plan.identity(opened.spec)
        plan, weights = (identity, weights) if plan is None else plan_and_weights(plan, identity, weights)
    tensors: Tensors = {} if weights is None else weights
    require_legal(opened, plan, tensors)
    for _, steps in plan.stacks:
        _refuse(steps, "live")
    return BoundPlan(opened, plan, tensors)


def modules_for(opened: OpenedModel, plan: Plan, weights: Tensors) -> ModuleTensors:
    """The tensors that `plan` names as modules of the model, see `shoal.executing.modules`: what `bind` is given as
    weights so that replaced layers are called, not lent. A replaced layer of which `weights` has nothing begins as its
    base layer. Raises what `require_legal` and `put_modules` raise."""
    seeds = dict(weights)
    for stack in opened.stacks:
        for run in runs(plan.steps(stack.name)):
            if run.weights is not None and not any(name.startswith(f"{run.weights}.") for name in weights):
                seeds |= {f"{run.weights}.{name}": tensor for name, tensor in stack.layer(run.layer).named_parameters()}
    require_legal(opened, plan, seeds)
    return put_modules(opened, plan, weights)


def refuse_second_plan(opened: OpenedModel) -> None:
    """Raise P122 when a plan is running on the model."""
    if any(isinstance(stack.layers, LayerProxyList) for stack in opened.stacks):
        raise PlanError("another plan is running on this model; restore it first", code="P122")


@contextmanager
def with_graph(model: nn.Module, name: str) -> Iterator[None]:
    """Meanwhile the graph `name` (`shoal.graphs`) is on the model, and no plan is put on it."""
    names: list[str] = model.__dict__.setdefault(_GRAPHS, [])
    names.append(name)
    try:
        yield
    finally:
        names.remove(name)
        if not names:
            del model.__dict__[_GRAPHS]


def refuse_graphs(opened: OpenedModel) -> None:
    """Raise U662 when a graph is on the model: matrices that it changed are no longer those of the base, beside which a
    plan's own tensors stand."""
    if names := opened.model.__dict__.get(_GRAPHS):
        raise UsageError(
            f"--graph {', '.join(names)} is on this model already; put the plan on first and the graph behind it",
            code="U662",
        )


def require_legal(opened: OpenedModel, plan: Plan, tensors: Tensors) -> Plan:
    """The plan itself when it is legal on this model with these tensors. Raises what `check` finds, P129 for tensors of
    another kind than their layer holds, P126 for an order in which the family's layers cannot run, P153 for replaced
    layers that are sharded, P154 for modules at another layer than theirs, P109 for KV sharing beside an encoder, P141
    for layers that hand out no attention map, P163 for those that read a later layer and take no other mask."""
    modules = tensors if isinstance(tensors, ModuleTensors) else None
    shapes = shapes_of(tensors) if modules is None else modules.shapes
    require(plan, opened.spec, shapes, shapes_in(opened.stacks))
    beside_encoder = not is_causal(opened.model) and opened.model.config.is_encoder_decoder
    for stack in opened.stacks:
        steps = plan.steps(stack.name)
        refuse_order(stack, tuple(run.layer for run in runs(steps)))
        if modules is None:
            _refuse_lent(opened, stack, steps)
            refuse_unlike(stack, steps, tensors)
        else:
            refuse_shared(modules, stack, steps)
        if stack.name == "decoder" and beside_encoder:
            _refuse(undecided(steps), "beside_encoder", stack=stack.name, why=BETWEEN)
        refuse_mapless(steps, stack.layer)
        refuse_unmaskable(steps, stack.layer)
    return plan


def _refuse_lent(opened: OpenedModel, stack: Stack, steps: tuple[Step, ...]) -> None:
    """Raise P153 for tensors that would be lent to, or by, a layer that is spread over processes."""
    for run in runs(steps):
        if run.ids:
            refuse_sharded(stack.layer(run.layer), run)
        for layer in _tied_layers(opened, stack, run):
            refuse_sharded(layer, run)


def _tied_layers(opened: OpenedModel, stack: Stack, run: Run) -> tuple[nn.Module, ...]:
    """The layer of a tied run and the one whose matrices it has; none for any other run."""
    return () if run.tied_to is None else (stack.layer(run.layer), opened.layer_of(run.tied_to, stack))


def _refuse(steps: tuple[Step, ...], way: Way, **names: object) -> None:
    """Raise what the table says of steps that cannot go this way."""
    if no := refusal(steps, way, **names):
        raise PlanError(no.message, code=no.code)
