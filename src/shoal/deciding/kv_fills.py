"""What is stored for a token that skips a layer, so that all rows of the KV cache keep the same length.

One class for each fill, with two questions: what to store when no token runs the layer (`skipped`), and how to call the
layer when all or some do (`before_run`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from shoal.deciding.decisions import Decision
from shoal.deciding.forward import GatedForward, KVKind
from shoal.deciding.kv_deferred import catch_up, wait
from shoal.deciding.kv_state import COPIED, HOLE, PENDING, PROJECTED
from shoal.deciding.layer_arguments import Arguments
from shoal.deciding.masks import holed, seen_columns
from shoal.errors import PlanError
from shoal.executing.calls import Call, argument, with_argument
from shoal.executing.checkpointed import SharedKV
from shoal.executing.slots import KeysValues, Store, Take
from shoal.models.examine import LayerFacts
from shoal.plan import Run, Step


@dataclass(frozen=True)
class GatedRun:
    """A run that some token may skip, and that stores KV."""

    run: Run
    position: int
    """Of its step in the plan."""
    slot: int
    fact: LayerFacts
    kind: KVKind


@dataclass
class Prepared:
    """How to call the layer of a run."""

    hidden: torch.Tensor
    call: Call
    take: Take | None = None
    """What its cache is to do with keys and values; None: store them."""
    own: Callable[[torch.Tensor], torch.Tensor] = lambda out: out
    """From what the layer returns to what the tokens of this forward get."""
    late: int = 0
    """How many tokens of earlier forwards run with them."""


class KVFill:
    """The fill `none`: nothing is stored, and nobody may run a layer that he has skipped before."""

    code: ClassVar[int] = HOLE
    """What an entry of the cache is where a token has skipped."""
    runs_all: ClassVar[bool] = False
    """Whether tokens that have left run the layer as soon as another one does."""

    def skipped(self, gated: GatedRun, forward: GatedForward, hidden: torch.Tensor, call: Call) -> None:
        """No token of this forward runs: fill its columns. A pass without a cache needs none, nothing follows it."""
        if forward.cache is not None:
            forward.kv_state.mark(gated.slot, forward.view.past, self.code)
            self._fill(forward.cache, gated, forward, hidden, call)

    def before_run(
        self, gated: GatedRun, forward: GatedForward, active: Decision, hidden: torch.Tensor, call: Call
    ) -> Prepared:
        """The layer is called, for all tokens or for those that are `active`.

        Raises P139 for a run that would read what was never stored, P137 for a cache that cannot be changed so.
        """
        self._check(gated, forward, active)
        if not isinstance(active, bool):
            forward.kv_state.mark(gated.slot, forward.view.past, self.code, ~active)
        return self._prepared(gated, forward, active, hidden, call)

    def _fill(self, cache: Cache, gated: GatedRun, forward: GatedForward, hidden: torch.Tensor, call: Call) -> None:
        """Zeros that keep the row as long as the others; nobody reads them."""
        keys, values = gated.fact.keys, gated.fact.values
        assert keys is not None
        assert values is not None
        rows, tokens = forward.view.rows, forward.view.tokens
        _store(cache, gated.slot, *(hidden.new_zeros(rows, s[1], tokens, s[3]) for s in (keys, values)))

    def _check(self, gated: GatedRun, forward: GatedForward, active: Decision) -> None:
        """Not behind older columns that were skipped, nor within this pass."""
        readable = forward.kv_state.readable(gated.slot, forward.view.past)
        bad = False
        if readable is not None:
            rows = slice(None) if isinstance(active, bool) else active.any(-1).cpu().expand(forward.view.rows)
            bad = not bool(readable[rows].all())
        if not bad and not isinstance(active, bool):
            bad = bool((active & (~active).int().cummax(-1).values.bool()).any())
        if bad:
            layer = gated.run.layer
            raise PlanError(
                f"layer {layer} would read keys and values that were never stored, since the policy skipped it before; "
                f"give it a fill, as in {layer}?gate/project",
                code="P139",
            )

    def _prepared(
        self, gated: GatedRun, forward: GatedForward, active: Decision, hidden: torch.Tensor, call: Call
    ) -> Prepared:
        return Prepared(hidden, call)


class ProjectFill(KVFill):
    """Keys and values that the layer makes of the state that was carried past it.

    `project(gated, hidden, call)` stores them and says whether nothing else was computed.
    """

    code = PROJECTED

    def __init__(self, project: Callable[[GatedRun, torch.Tensor, Call], bool]) -> None:
        self.project = project

    def _fill(self, cache: Cache, gated: GatedRun, forward: GatedForward, hidden: torch.Tensor, call: Call) -> None:
        if self.project(gated, hidden, call):
            forward.projected += forward.all_tokens

    def _check(self, gated: GatedRun, forward: GatedForward, active: Decision) -> None:
        """The layer stores them for all."""


class CopyFill(KVFill):
    """The newest keys and values of a layer of the same kind."""

    code = COPIED

    def _fill(self, cache: Cache, gated: GatedRun, forward: GatedForward, hidden: torch.Tensor, call: Call) -> None:
        _store(cache, gated.slot, *(one.to(hidden.device) for one in forward.newest_kv[gated.kind]))

    def _check(self, gated: GatedRun, forward: GatedForward, active: Decision) -> None:
        """Whoever skips has copies."""

    def _prepared(
        self, gated: GatedRun, forward: GatedForward, active: Decision, hidden: torch.Tensor, call: Call
    ) -> Prepared:
        return Prepared(hidden, call, CopiedKV(gated, forward, active))


class MaskFill(KVFill):
    """Nothing: the layer does not see the columns of tokens that skipped it."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments

    def _check(self, gated: GatedRun, forward: GatedForward, active: Decision) -> None:
        """Holes are not attended to."""

    def _prepared(
        self, gated: GatedRun, forward: GatedForward, active: Decision, hidden: torch.Tensor, call: Call
    ) -> Prepared:
        view = forward.view
        readable = forward.kv_state.readable(gated.slot, view.past + view.tokens)
        if readable is None:
            return Prepared(hidden, call)
        at = self.arguments.masks[gated.run.layer]
        assert at is not None  # P137 was raised before anything ran
        mask = holed(
            argument(call, at),
            readable,
            past=view.past,
            tokens=view.tokens,
            keys=seen_columns(forward.cache, gated.slot, view.tokens),
            window=gated.fact.window,
            boolean=self.arguments.boolean[gated.run.layer],
            like=hidden,
        )
        return Prepared(hidden, with_argument(call, at, mask))


class DeferFill(KVFill):
    """The layer runs later, in one batch with the next token that goes deeper."""

    code = PENDING
    runs_all = True

    def __init__(self, arguments: Arguments, following: dict[int, int]) -> None:
        """`following`: from the position of a run to that of the next one."""
        self.arguments, self.following = arguments, following

    def _fill(self, cache: Cache, gated: GatedRun, forward: GatedForward, hidden: torch.Tensor, call: Call) -> None:
        wait(forward, gated.position, gated.run.layer, hidden, call, self.arguments)
        super()._fill(cache, gated, forward, hidden, call)

    def _check(self, gated: GatedRun, forward: GatedForward, active: Decision) -> None:
        """Whoever waits runs with it."""

    def _prepared(
        self, gated: GatedRun, forward: GatedForward, active: Decision, hidden: torch.Tensor, call: Call
    ) -> Prepared:
        if forward.kv_state.waiting:
            late = catch_up(gated.position, gated.slot, gated.run.layer, forward, self.arguments, call, hidden)
            if late is not None:
                following = self.following[gated.position]
                return Prepared(late.hidden, late.call, late.take, lambda out: late.part(out, following), late.tokens)
        return Prepared(hidden, call)


class CopiedKV:
    """A run whose keys and values others copy shows them; one that copies for some tokens mixes them in. Called as what
    its cache does with them."""

    def __init__(self, gated: GatedRun, forward: GatedForward, active: Decision = True) -> None:
        self.gated, self.forward, self.active = gated, forward, active

    def __call__(self, store: Store, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        states = self.mix((keys, values), self.given)
        self.show(states)
        return store(*states)

    @property
    def given(self) -> tuple[torch.Tensor, ...]:
        """What is copied, if some tokens copy."""
        return () if isinstance(self.active, bool) else self.forward.newest_kv[self.gated.kind]

    def mix(self, own: KeysValues, given: tuple[torch.Tensor, ...]) -> KeysValues:
        """The layer's own keys and values for the tokens that run it, and those `given` for the others."""
        if not given:
            return own
        assert isinstance(self.active, torch.Tensor)
        runs, (keys, values) = self.active[:, None, :, None], own
        old_keys, old_values = (one.to(keys.device) for one in given)
        return torch.where(runs, keys, old_keys), torch.where(runs, values, old_values)

    def show(self, states: KeysValues) -> None:
        """They are the newest of their kind."""
        self.forward.newest_kv[self.gated.kind] = states

    def shared(self) -> SharedKV | None:
        """The same for a call that is checkpointed."""
        place = self.gated.fact.cache_at
        return None if place is None else SharedKV(place, self.given, self.mix, self.show)


def _store(cache: Cache, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    cache.update(keys, values, slot)


def next_run(steps: tuple[Step, ...], position: int) -> int:
    """The position of the run behind `position`; the number of steps when there is none."""
    return next((at for at in range(position + 1, len(steps)) if isinstance(steps[at], Run)), len(steps))
