"""The model on its stage: all of it, a draft of it, or the layers that the draft left out, over one KV cache.

A draft whose first k steps are the layers 0..k-1 computes there what the base model would: rows and states behind layer
k-1 are kept, and the verification runs the layers k.. on those states alone. An exit draft is the case in which nothing
comes behind layer k-1; a skip set that begins at layer 3 shares layers 0, 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from shoal.deciding.readout import Readout
from shoal.errors import PlanError, UsageError
from shoal.executing.conductor import PlannedList
from shoal.models.opened import open_model
from shoal.models.order import refuse_order
from shoal.plan import Plan, Run, Spec, check, format_steps, require
from shoal.plan.steps import Step
from shoal.speculating.feed import Feed
from shoal.speculating.rows import lent
from shoal.speculating.steering import Part, Stateful, SteeredList

_KEPT = 16
"""Drafts held ready; choosers on the fly come back to the same few."""


class Playable(Protocol):
    """What a list of layers can yield in place of its layers."""

    taps: list[Any]


@dataclass
class Ready:
    """A draft made ready to run."""

    steps: tuple[Run, ...]
    shared: int
    """How many layers from the first on draft and verification have in common."""
    draft: Part
    ahead: Part
    """The shared layers alone."""
    rest: Part
    """What the verification still has to run."""


@dataclass
class Stage:
    """One causal model and the list of layers that is put in place of its own while it generates."""

    model: PreTrainedModel
    share: bool = True
    ready: dict[tuple[Run, ...], Ready] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.stack,) = open_model(self.model).stacks
        if isinstance(self.stack.layers, PlannedList):
            raise PlanError("another plan is running on this model; restore it first", code="P122")
        self.probe = open_model(self.model).facts(self.stack.name)
        self.spec: Spec = open_model(self.model).spec
        self.depth = self.stack.depth
        self.takes = frozenset(signature(self.model.forward).parameters)
        self.original = self.stack.layers
        self.list = SteeredList(self.stack, self.probe)

    def __enter__(self) -> Stage:
        if isinstance(self.stack.layers, PlannedList):
            raise PlanError("another plan is running on this model; restore it first", code="P122")
        setattr(self.stack.owner, self.stack.attr, self.list)
        return self

    def __exit__(self, *_: object) -> None:
        self.list.play(None)
        setattr(self.stack.owner, self.stack.attr, self.original)

    @cached_property
    def readout(self) -> Readout:
        """Final norm and head for states behind any layer. Use inside `with stage:`; the first use runs one token."""
        return Readout(self.model, self.stack, self._ending)

    @contextmanager
    def _ending(self, state: torch.Tensor) -> Iterator[None]:
        part = Part.of(Stateful(self.list, self.stack, self.probe, ()))
        part.conductor.states = state
        self.list.play(part)
        try:
            yield
        finally:
            self.list.play(None)

    def prepare(self, steps: tuple[Step, ...]) -> Ready:
        """Raises P1xx for steps that the model cannot run, P150 for steps that no draft can have."""
        plain = _runs(steps)
        if plain not in self.ready:
            self._legal(plain)
            if len(self.ready) >= _KEPT:
                self.ready.pop(next(iter(self.ready)))
            self.ready[plain] = self._make(plain)
        return self.ready[plain]

    def _make(self, steps: tuple[Run, ...]) -> Ready:
        shared = self._shared(steps)
        after = shared - 1 if shared else None
        where = (self.list, self.stack, self.probe)
        rest = tuple(Run(i) for i in range(shared, self.depth))
        return Ready(
            steps,
            shared,
            Part.of(Stateful(*where, steps, after)),
            Part.of(Stateful(*where, steps[:shared], after)),
            Part.of(Stateful(*where, rest)),
        )

    def _legal(self, steps: tuple[Run, ...]) -> None:
        require(self._plan(steps), self.spec)
        refuse_order(self.stack, tuple(run.layer for run in steps))

    def _plan(self, steps: tuple[Run, ...]) -> Plan:
        return Plan.identity(self.spec).with_steps(steps)

    def _shared(self, steps: tuple[Run, ...]) -> int:
        """Layers in common; none where more than the hidden state goes from one layer to a later one."""
        common = next((n for n, run in enumerate(steps) if run != Run(n)), len(steps))
        if not self.share or any(fact.carried for fact in self.probe.layers):
            return 0
        if common == self.depth:
            return common
        rest = tuple(Run(i) for i in range(common, self.depth))
        try:
            refuse_order(self.stack, tuple(run.layer for run in rest))
        except PlanError:
            return 0
        return 0 if check(self._plan(rest), self.spec) else common

    def full(self, feed: Feed, ids: torch.Tensor, new: int, cache: Cache) -> torch.Tensor:
        """Logits of the base model at the last `new` tokens, [new, vocabulary], float32."""
        self.list.play(None)
        return _scores(self.model(**feed(ids, new, cache), return_dict=True), new)

    def logits(self, part: Part, feed: Feed, ids: torch.Tensor, new: int, cache: Cache) -> torch.Tensor:
        """The same with `part` in place of the layers; `cache` is made of the rows of `part`."""
        self.list.play(part)
        try:
            return _scores(self.model(**feed(ids, new, cache), return_dict=True), new)
        finally:
            self.list.play(None)

    def through(self, part: Playable, feed: Feed, ids: torch.Tensor, cache: Cache) -> Any:
        """Take the last token through `part` without the head."""
        inputs = feed(ids, 1, cache)
        inputs.pop("logits_to_keep", None)
        self.list.play(part)
        try:
            return self.model.base_model(**inputs)
        finally:
            self.list.play(None)


class Draft:
    """One round: tokens drafted one by one over `cache`, then judged by the base model."""

    def __init__(self, stage: Stage, ready: Ready, feed: Feed, cache: Cache) -> None:
        self.stage, self.ready, self.feed, self.cache = stage, ready, feed, cache
        self.rows = lent(cache, ready.draft.rows, ready.shared)
        for part in (ready.draft, ready.ahead):
            part.conductor.forget()

    def next(self, ids: torch.Tensor) -> torch.Tensor:
        """The draft's logits behind the last token of `ids`, [1, vocabulary]."""
        return self.stage.logits(self.ready.draft, self.feed, ids, 1, self.rows)

    def judge(self, ids: torch.Tensor, new: int) -> torch.Tensor:
        """The base model's logits at the last `new` tokens of `ids`, [new, vocabulary]; the cache then holds them all.

        `new` is one more than was drafted: the last drafted token has not been anywhere yet.
        """
        ready, stage = self.ready, self.stage
        if not ready.shared:
            return stage.full(self.feed, ids, new, self.cache)
        stage.through(ready.ahead, self.feed, ids, lent(self.cache, ready.ahead.rows, ready.shared))
        states = [*ready.draft.conductor.saved, *ready.ahead.conductor.saved]
        ready.rest.conductor.states = torch.cat(states, dim=-2)
        rows = lent(self.cache, ready.rest.rows, len(ready.rest.rows))
        if not ready.rest.rows:  # nothing is left to run; masks are made from some row all the same
            rows.layers = list(self.cache.layers)
        try:
            return stage.logits(ready.rest, self.feed, ids, new, rows)
        finally:
            for part in (ready.draft, ready.ahead, ready.rest):
                part.conductor.forget()


def _scores(out: Any, new: int) -> torch.Tensor:
    return out.logits[0, -new:].to(dtype=torch.float32, copy=True)


def _runs(steps: tuple[Step, ...]) -> tuple[Run, ...]:
    plain: list[Run] = []
    if not steps:
        raise UsageError("a draft of no layers drafts nothing; keep at least one, as in exit:8", code="U610")
    for step in steps:
        if not isinstance(step, Run) or not step.plain:
            raise PlanError(
                f"a draft keeps layers or parts of layers of the base model, and {format_steps((step,))} is neither; "
                "write the layers that it keeps, as in skip:0-11,14-29",
                code="P150",
            )
        if plain and step.layer <= plain[-1].layer:
            raise PlanError(
                f"layer {step.layer} would come after layer {plain[-1].layer} in the draft, and the KV rows of the "
                "base model hold each layer once and in order; write them ascending, each once",
                code="P150",
            )
        plain.append(step)
    return tuple(plain)
