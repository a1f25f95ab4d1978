"""One forward under a policy: what the policy sees of it, and what has been decided and stored so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache

from shoal.deciding.decisions import Decision, collapse_uniform, logical_or, over_states, select
from shoal.deciding.kv_state import KVState
from shoal.deciding.learning import Learning
from shoal.executing.forward import Forward
from shoal.executing.slots import KeysValues
from shoal.executing.weights import Tensors
from shoal.models.examine import LayerFacts, StackFacts

KVKind = tuple[Any, ...]
"""What two layers must have in common for one to take the other's keys and values: their shapes and window."""


def kv_kind(fact: LayerFacts) -> KVKind:
    """The kind of one layer."""
    return fact.keys, fact.values, fact.window


def kinds_of(facts: StackFacts) -> list[KVKind]:
    """The kind of every layer."""
    return [kv_kind(fact) for fact in facts.layers]


@dataclass(frozen=True)
class ForwardView:
    """One forward as a policy sees it. The two dictionaries are the policy's own; all else is to be read."""

    rows: int
    tokens: int
    """Columns of this forward; a prefill has as many as the prompt, padding included."""
    past: int
    """Columns that the cache holds already."""
    prompt: int | None
    """Columns from this one on count as generated although nothing is cached: a teacher-forced pass."""
    real: torch.Tensor | None = None
    """Which columns of this forward are no padding, bool [batch, tokens]; None: all."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Whatever the policy wants to remember until the end of this forward."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Whatever it wants to remember of these sequences: it stays beside their KV cache, is empty when the cache is, and
    ends with the forward when there is none."""
    tensors: Tensors = field(default_factory=dict)
    """Those that the plan names, by which a gate may have some of its own (GATE.weight)."""
    learning: Learning | None = None
    """In training: how far it is, what is drawn from, and where a policy writes down what its terms need."""

    prepared: Any = None
    """What the policy made of the model before its first forward (`Policy.prepare`)."""
    written: torch.Tensor | None = None
    """Which tokens count as generated, bool [batch, tokens], where rows differ, as in training; None: by columns."""

    def generated(self, column: int) -> bool:
        """Whether `column` counts as decoding: it comes after a prefill, or `prompt` says so."""
        return self.past > 0 or (self.prompt is not None and column >= self.prompt)

    def each(self, answer: Callable[[int], bool], device: torch.device) -> Decision:
        """One answer for each column of this forward, as a bool where all agree."""
        answers = [answer(self.past + n) for n in range(self.tokens)]
        return answers[0] if len(set(answers)) == 1 else torch.tensor([answers], device=device)

    def decoding(self, device: torch.device) -> Decision:
        """Which tokens count as decoding."""
        if self.written is not None:
            return self.written.to(device)
        return self.past > 0 if self.prompt is None else self.each(self.generated, device)


@dataclass(kw_only=True)
class GatedForward(Forward):
    """The record of one forward under a policy; `view` is what the policy is shown of it."""

    view: ForwardView
    cache: Cache | None
    kv_state: KVState
    ids: torch.Tensor | None
    left: Decision = False
    """Which tokens have left at an exit."""
    left_with: torch.Tensor | None = None
    """For those that have left: the state that final norm and head shall read."""
    shares: torch.Tensor | None = None
    """How much of each token's last state weighted exits have given so far, [batch, tokens]; None: there was none."""
    given: torch.Tensor | None = None
    """What they have given, the sum of weight x state, [batch, tokens, hidden]."""
    before: torch.Tensor | None = None
    """The hidden state one run before."""
    heads: list[tuple[Decision, str]] = field(default_factory=list)
    """(which tokens, with whose head) for those that have left."""
    newest_kv: dict[KVKind, KeysValues] = field(default_factory=dict)
    """The newest keys and values of each kind of layer, [batch, heads, tokens, dim], for the fill copy."""
    projected: int = 0
    """Tokens x layers of which nothing but keys and values was computed."""
    depth: float = 0.0
    """Layers run by all tokens; `own_depth` [batch, tokens] has those that only some ran."""
    own_depth: torch.Tensor | None = None

    @property
    def all_tokens(self) -> int:
        """Tokens of all rows."""
        return self.view.rows * self.view.tokens

    def ran(self, size: float, where: Decision, share: torch.Tensor | None = None) -> None:
        """These tokens ran a layer (size 1) or a part of one (0.5); of a `share` [batch or 1, tokens] each so much."""
        if where is False:
            return
        if isinstance(where, bool) and share is None:
            self.depth += size
            return
        if self.own_depth is None:
            self.own_depth = torch.zeros(self.view.rows, self.view.tokens)
        counted = torch.ones(()) if share is None else share.detach().float().cpu()
        self.own_depth += size * (counted if isinstance(where, bool) else counted * where.cpu())

    def depths(self) -> torch.Tensor:
        """How many layers each token ran, [batch, tokens] on the CPU."""
        depths = torch.full((self.view.rows, self.view.tokens), self.depth)
        return depths if self.own_depth is None else depths + self.own_depth

    def give(self, weight: torch.Tensor, where: Decision, state: torch.Tensor) -> None:
        """The exit with this `state` gives so much (`weight` [batch or 1, tokens], and no more than is left) to the
        tokens of `where`."""
        if where is False:
            return
        share = (weight if where is True else weight * where.to(weight)).expand(self.view.rows, -1)
        if self.shares is not None:
            share = torch.minimum(share, 1 - self.shares.to(share.device))
        own = over_states(share, state) * state.to(torch.promote_types(state.dtype, torch.float32))
        self.shares = share if self.shares is None else self.shares + share.to(self.shares.device)
        self.given = own if self.given is None else self.given.to(own.device) + own

    def rest(self, state: torch.Tensor) -> torch.Tensor:
        """What is read of tokens that end with `state`: what earlier exits gave, and the rest of `state`."""
        if self.shares is None or self.given is None:
            return state
        # in float32 at least: shares that are rounded to a short type do not add up to 1
        rest = over_states(1 - self.shares, state) * state.to(self.given.dtype)
        return (self.given.to(state.device) + rest).to(state.dtype)

    def leave(self, where: Decision, state: torch.Tensor, head: str) -> None:
        """These tokens, none of which had left, end here with `state`, to be read by `head`."""
        state = self.rest(state)
        self.left_with = state if self.left_with is None else select(where, state, self.left_with)
        self.left = collapse_uniform(where if self.left is False else logical_or(self.left, where))
        self.heads.append((where, head))

    def last_state(self, hidden: torch.Tensor) -> torch.Tensor:
        """What final norm and head shall read, where `hidden` is the state behind the last layer."""
        hidden = self.rest(hidden)
        if self.left_with is None:
            return hidden
        return select(self.left, self.left_with.to(hidden.device), hidden)
