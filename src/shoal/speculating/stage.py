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
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from shoal.deciding.exit_readout import Readout
from shoal.errors import PlanError, UsageError
from shoal.executing.bind import bind, refuse_second_plan
from shoal.executing.forward import Forward
from shoal.models.opened import open_model
from shoal.models.order import refuse_order
from shoal.plan import Plan, Run, Spec, check, require
from shoal.plan.capabilities import refusal
from shoal.plan.steps import Step, runs
from shoal.speculating.feed import Feed
from shoal.speculating.part import Part
from shoal.speculating.rows import lent

_KEPT = 16
"""Drafts held ready; choosers on the fly come back to the same few."""


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
        self.opened = open_model(self.model)
        refuse_second_plan(self.opened)
        (self.stack,) = self.opened.stacks
        self.facts = self.opened.facts(self.stack.name)
        self.spec: Spec = self.opened.spec
        self.depth = self.stack.depth
        self.takes = self.opened.takes
        self.whole = bind(self.opened)

    def __enter__(self) -> Stage:
        refuse_second_plan(self.opened)
        return self

    def __exit__(self, *_: object) -> None:
        """The model is as it was: parts are put on it for one pass each."""

    @cached_property
    def readout(self) -> Readout:
        """Final norm and head for states behind any layer. Use inside `with stage:`; the first use runs one token."""
        return Readout(self.opened, self._ending)

    @contextmanager
    def _ending(self, state: torch.Tensor) -> Iterator[None]:
        with self.whole.running(), self.whole.executor().between(self.depth, state):
            yield

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
        rest = tuple(Run(i) for i in range(shared, self.depth))
        return Ready(
            steps,
            shared,
            Part(self.opened, steps, after),
            Part(self.opened, steps[:shared], after),
            Part(self.opened, rest),
        )

    def _legal(self, steps: tuple[Run, ...]) -> None:
        require(self._plan(steps), self.spec)
        refuse_order(self.stack, tuple(run.layer for run in steps))

    def _plan(self, steps: tuple[Run, ...]) -> Plan:
        return Plan.identity(self.spec).with_steps(steps)

    def _shared(self, steps: tuple[Run, ...]) -> int:
        """Layers in common; none where more than the hidden state goes from one layer to a later one."""
        common = next((n for n, run in enumerate(steps) if run != Run(n)), len(steps))
        if not self.share or any(fact.carried for fact in self.facts.layers):
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
        return _scores(self.model(**feed(ids, new, cache), return_dict=True), new)

    def logits(self, part: Part, feed: Feed, ids: torch.Tensor, new: int, cache: Cache) -> torch.Tensor:
        """The same with `part` in place of the layers; `cache` is made of the rows of `part`."""
        inputs = feed(ids, new, cache)
        with part.running():
            return _scores(self.model(**inputs, return_dict=True), new)

    def through(self, part: Part, feed: Feed, ids: torch.Tensor, cache: Cache) -> None:
        """Take the last token through `part` without the head."""
        with part.running():
            self._without_head(feed, ids, cache)

    def prepared(self, feed: Feed, ids: torch.Tensor, cache: Cache) -> Forward:
        """What the layers are called with for the last token."""
        with self.whole.running():
            return self.whole.executor().prepared(lambda: self._without_head(feed, ids, cache))

    def _without_head(self, feed: Feed, ids: torch.Tensor, cache: Cache) -> None:
        inputs = feed(ids, 1, cache)
        inputs.pop("logits_to_keep", None)
        self.model.base_model(**inputs)


class Draft:
    """One round: tokens drafted one by one over `cache`, then judged by the base model."""

    def __init__(self, stage: Stage, ready: Ready, feed: Feed, cache: Cache) -> None:
        self.stage, self.ready, self.feed, self.cache = stage, ready, feed, cache
        self.rows = lent(cache, ready.draft.rows, ready.shared)
        for part in (ready.draft, ready.ahead):
            part.forget()

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
        states = [*ready.draft.saved, *ready.ahead.saved]
        ready.rest.states = torch.cat(states, dim=-2)
        rows = lent(self.cache, ready.rest.rows, len(ready.rest.rows))
        if not ready.rest.rows:  # nothing is left to run; masks are made from some row all the same
            rows.layers = list(self.cache.layers)
        try:
            return stage.logits(ready.rest, self.feed, ids, new, rows)
        finally:
            for part in (ready.draft, ready.ahead, ready.rest):
                part.forget()


def _scores(out: Any, new: int) -> torch.Tensor:
    return out.logits[0, -new:].to(dtype=torch.float32, copy=True)


def _runs(steps: tuple[Step, ...]) -> tuple[Run, ...]:
    if not steps:
        raise UsageError("a draft of no layers drafts nothing; keep at least one, as in exit:8", code="U610")
    if no := refusal(steps, "drafted"):
        raise PlanError(no.message, code=no.code)
    return tuple(runs(steps))
