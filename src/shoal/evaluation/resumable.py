"""Forwards that begin in the middle, with a state that another forward left there: where that is exact, and which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from shoal.errors import ModelError
from shoal.executing.bind import BoundPlan, bind
from shoal.executing.recorder import Recorder
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.models.opened import OpenedModel
from shoal.plan.around import states_read
from shoal.plan.prefix import Prefix, prefixes
from shoal.recording.state_store import StateStore

Answer = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(ids, mask) -> what the model makes of them: logits, states."""
TRIAL_TOKENS = 8
"""Tokens with which it is proved that a forward may begin in the middle."""


class Resumable:
    """Cut -> whether the base model gives the same `answer`, bit for bit, when it begins at that layer; tried once a
    cut, on the first tokens of `ids`. False where something besides the hidden state travels from layer to layer."""

    def __init__(self, opened: OpenedModel, ids: torch.Tensor, answer: Answer) -> None:
        self._opened, self._ids, self._answer = opened, ids[:1, :TRIAL_TOKENS], answer
        self._exact: dict[int, bool] = {}
        self._states: dict[int, torch.Tensor] = {}
        self._right: torch.Tensor | None = None

    def __call__(self, cut: int) -> bool:
        if cut not in self._exact:
            with evaluating(self._opened.model), bind(self._opened).running() as bound:
                self._exact[cut] = self._tried(bound, cut)
        return self._exact[cut]

    def _tried(self, bound: BoundPlan, cut: int) -> bool:
        mask = torch.ones_like(self._ids)  # without one, a padding token among them makes some versions warn
        executor = bound.executor()

        def keep(index: int, hidden: torch.Tensor) -> None:
            if isinstance(hidden, torch.Tensor):
                self._states[index] = hidden.clone()

        try:
            if self._right is None:
                with executor.recording(Entering(keep)):
                    self._right = self._answer(self._ids, mask)
            if cut not in self._states:
                return False
            with executor.between(cut, self._states[cut].clone()):
                again = self._answer(self._ids, mask)
        except (ModelError, RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError):
            # a layer behind the cut asks for what one before it would have left, or the model does not say its answer
            return False
        return torch.equal(again, self._right)


class SharedStates:
    """Plans begin where they part from another plan, `whole`, with the state that it left there on the same batch.

    A plan that reads an earlier state (`ID.reads.N`), one of a model with several stacks, and one that parts at a layer
    where that is not exact (`Resumable`) begins at the first layer.
    """

    def __init__(self, whole: BoundPlan, plans: Sequence[BoundPlan | None], resumable: Resumable) -> None:
        read = states_read([name.partition(".")[2] for name in whole.tensors])
        known = {} if len(whole.opened.stacks) > 1 or read else prefixes(whole.plan)
        self._whole = whole
        self.cuts = [0 if plan is None else _parting(known, prefixes(plan.plan), resumable) for plan in plans]
        """By plan the layer at which it begins."""
        self._store = StateStore(device_of(whole.model))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """`with shared.kept(): ...` - the forward of `whole` inside leaves the states; those of the last are gone."""
        self._store.close()
        cuts = set(self.cuts)

        def keep(index: int, hidden: torch.Tensor) -> None:
            if index in cuts and isinstance(hidden, torch.Tensor):
                self._store.put(index, hidden)

        with self._whole.executor().recording(Entering(keep)):
            yield

    @contextmanager
    def begun(self, place: int, bound: BoundPlan) -> Iterator[None]:
        """`with shared.begun(place, bound): ...` - the forward of the plan at `place` inside begins where it parts."""
        state = self._store.get(self.cuts[place]) if self.cuts[place] else None
        if state is None:
            yield
        else:
            with bound.executor().between(self.cuts[place], state):
                yield

    def close(self) -> None:
        """Forget the states."""
        self._store.close()


class Entering(Recorder):
    """Hands the state that enters each layer to a function."""

    def __init__(self, enters: Callable[[int, torch.Tensor], None]) -> None:
        self._enters = enters

    def enters(self, layer: int, hidden: torch.Tensor) -> None:
        self._enters(layer, hidden)


def _parting(known: dict[int, Prefix], own: dict[int, Prefix], resumable: Resumable) -> int:
    """The last cut up to which both run the same, 0 if there is none."""
    cuts = sorted((cut for cut, prefix in own.items() if known.get(cut) == prefix), reverse=True)
    return next((cut for cut in cuts if resumable(cut)), 0)
