"""One model run whole, as a draft, or with only the layers that the draft left out, over one KV cache.

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

from shoal.errors import PlanError, UsageError
from shoal.executing.bind import bind, refuse_second_plan
from shoal.executing.exit_readout import Readout
from shoal.executing.forward import Forward
from shoal.models.opened import open_model
from shoal.models.order import refuse_order
from shoal.plan import Plan, Run, Spec, check, require
from shoal.plan.capabilities import refusal
from shoal.plan.steps import Step, runs
from shoal.speculating.forward_inputs import FeedsForward
from shoal.speculating.layer_subset import LayerSubset
from shoal.speculating.rows import select_rows

_KEPT = 16
"""How many prepared drafts are kept; choosers come back to the same few."""


@dataclass
class PreparedDraft:
    """A draft with everything that its rounds need, bound once."""

    steps: tuple[Run, ...]
    shared: int
    """How many layers from the first on draft and verification have in common."""
    draft: LayerSubset
    shared_subset: LayerSubset
    """The shared layers, run alone for the last drafted tokens, which no layer has seen."""
    remaining: LayerSubset
    """The layers that the verification still has to run."""


@dataclass
class DraftRunner:
    """Runs one causal model and its drafts, each of which takes the place of its layers for one pass."""

    model: PreTrainedModel
    share: bool = True
    prepared: dict[tuple[Run, ...], PreparedDraft] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.opened = open_model(self.model)
        refuse_second_plan(self.opened)
        (self.stack,) = self.opened.stacks
        self.facts = self.opened.facts(self.stack.name)
        self.spec: Spec = self.opened.spec
        self.depth = self.stack.depth
        self.takes = self.opened.takes
        self.whole = bind(self.opened)

    def __enter__(self) -> DraftRunner:
        refuse_second_plan(self.opened)
        return self

    def __exit__(self, *_: object) -> None:
        """The model is as it was: each subset of layers is on it for one pass only."""

    @cached_property
    def readout(self) -> Readout:
        """Final norm and head for states behind any layer. Use it inside `with runner:`; the first use runs a token."""
        return Readout(self.opened, self._ending)

    @contextmanager
    def _ending(self, state: torch.Tensor) -> Iterator[None]:
        with self.whole.running(), self.whole.executor().between(self.depth, state):
            yield

    def prepare(self, steps: tuple[Step, ...]) -> PreparedDraft:
        """Raises P1xx for steps that the model cannot run, P150 for steps that no draft can have."""
        plain = _runs(steps)
        if plain not in self.prepared:
            self._legal(plain)
            if len(self.prepared) >= _KEPT:
                self.prepared.pop(next(iter(self.prepared)))
            self.prepared[plain] = self._make(plain)
        return self.prepared[plain]

    def _make(self, steps: tuple[Run, ...]) -> PreparedDraft:
        shared = self._shared(steps)
        after = shared - 1 if shared else None
        rest = tuple(Run(i) for i in range(shared, self.depth))
        return PreparedDraft(
            steps,
            shared,
            LayerSubset(self.opened, steps, after),
            LayerSubset(self.opened, steps[:shared], after),
            LayerSubset(self.opened, rest),
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

    def full(self, feed: FeedsForward, ids: torch.Tensor, new: int, cache: Cache) -> torch.Tensor:
        """Logits of the base model at the last `new` tokens, [new, vocabulary], float32."""
        return _scores(self.model(**feed(ids, new, cache), return_dict=True), new)

    def logits(
        self, subset: LayerSubset, feed: FeedsForward, ids: torch.Tensor, new: int, cache: Cache
    ) -> torch.Tensor:
        """The same with `subset` in place of the layers; `cache` is made of the rows of `subset`."""
        inputs = feed(ids, new, cache)
        with subset.running():
            return _scores(self.model(**inputs, return_dict=True), new)

    def run_layers(self, subset: LayerSubset, feed: FeedsForward, ids: torch.Tensor, new: int, cache: Cache) -> None:
        """Run the last `new` tokens through `subset` without the head."""
        with subset.running():
            self._without_head(feed, ids, new, cache)

    def layer_calls(self, feed: FeedsForward, ids: torch.Tensor, cache: Cache) -> Forward:
        """What the layers are called with for the last token."""
        with self.whole.running():
            return self.whole.executor().prepared(lambda: self._without_head(feed, ids, 1, cache))

    def _without_head(self, feed: FeedsForward, ids: torch.Tensor, new: int, cache: Cache) -> None:
        inputs = feed(ids, new, cache)
        inputs.pop("logits_to_keep", None)
        self.model.base_model(**inputs)


class Draft:
    """One round: tokens are drafted over `cache`, then verified by the base model."""

    def __init__(self, runner: DraftRunner, prepared: PreparedDraft, feed: FeedsForward, cache: Cache) -> None:
        self.runner, self.prepared, self.feed, self.cache = runner, prepared, feed, cache
        self.rows = select_rows(cache, prepared.draft.rows, prepared.shared)
        self.unrun = 1
        """How many of the drafted tokens, the last ones, no layer has seen."""
        for subset in (prepared.draft, prepared.shared_subset):
            subset.forget()

    def next(self, ids: torch.Tensor) -> torch.Tensor:
        """The draft's logits behind the last token of `ids`, [1, vocabulary]."""
        return self.behind(ids, 1)

    def behind(self, ids: torch.Tensor, new: int) -> torch.Tensor:
        """The draft's logits behind each of the last `new` tokens of `ids`, [new, vocabulary]."""
        return self.runner.logits(self.prepared.draft, self.feed, ids, new, self.rows)

    def verify(self, ids: torch.Tensor, new: int) -> torch.Tensor:
        """The base model's logits at the last `new` tokens of `ids`, [new, vocabulary]; the cache then holds them all.

        `new` is one more than was drafted.
        """
        prepared, runner = self.prepared, self.runner
        if not prepared.shared:
            return runner.full(self.feed, ids, new, self.cache)
        runner.run_layers(
            prepared.shared_subset,
            self.feed,
            ids,
            self.unrun,
            select_rows(self.cache, prepared.shared_subset.rows, prepared.shared),
        )
        states = [*prepared.draft.saved, *prepared.shared_subset.saved]
        prepared.remaining.states = torch.cat(states, dim=-2)
        rows = select_rows(self.cache, prepared.remaining.rows, len(prepared.remaining.rows))
        if not prepared.remaining.rows:  # nothing is left to run; masks are made from some row all the same
            rows.layers = list(self.cache.layers)
        try:
            return runner.logits(prepared.remaining, self.feed, ids, new, rows)
        finally:
            for subset in (prepared.draft, prepared.shared_subset, prepared.remaining):
                subset.forget()


def _scores(out: Any, new: int) -> torch.Tensor:
    return out.logits[0, -new:].to(dtype=torch.float32, copy=True)


def _runs(steps: tuple[Step, ...]) -> tuple[Run, ...]:
    if not steps:
        raise UsageError("a draft of no layers drafts nothing; keep at least one, as in exit:8", code="U610")
    if no := refusal(steps, "drafted"):
        raise PlanError(no.message, code=no.code)
    return tuple(runs(steps))
