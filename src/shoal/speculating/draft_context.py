"""What a chooser may look at before a round: the text, the cache behind it, and single layers at the last token."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from shoal.plan.steps import Run
from shoal.speculating.draft_runner import DraftRunner
from shoal.speculating.forward_inputs import ForwardInputs
from shoal.speculating.layer_outputs import LayerOutputs
from shoal.speculating.layer_trial import LayerTrial
from shoal.speculating.rows import select_rows
from shoal.speculating.stats import Stats

_FORMER = {"bench": "layer_trial", "stage": "runner", "watch": "outputs", "watched": "exit_matches"}


@dataclass(frozen=True)
class DraftContext:
    """What is known before a round of speculation. The last token of `ids`, [1, length], is not in the cache yet."""

    runner: DraftRunner
    feed: ForwardInputs
    cache: Cache
    ids: torch.Tensor
    stats: Stats
    outputs: LayerOutputs | None = None

    @property
    def length(self) -> int:
        """Tokens of text so far."""
        return int(self.ids.shape[1])

    def layer_trial(self) -> LayerTrial:
        """Single layers, to be run on states of the last token."""
        return LayerTrial(self.runner, self.feed, self.cache, self.ids)

    def exit_matches(self) -> torch.Tensor | None:
        """For each token written since the last call, the newest last, and each layer that the chooser `watches`: is it
        the token that final norm and head predict from the state behind that layer? bool [layers, tokens], of at most
        8 tokens; None for none.

        The states are those of the verification, so this costs no layer, one call of the head for all.
        """
        states = None if self.outputs is None else self.outputs.take()
        if states is None:
            return None
        # the layers of one model may be on several devices
        together = torch.cat([state.to(states[-1].device) for state in states], -2)
        said = self.runner.readout(together).argmax(-1)[0]
        wrote = self.ids[0, -states[0].shape[-2] :]
        return said.view(len(states), -1) == wrote.to(said.device)

    def __getattr__(self, name: str) -> Any:
        """Former names, which drafts in files of users may use, with a note."""
        new = _FORMER.get(name)
        if new is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warnings.warn(f"{name} of a draft's context is now {new}; use that", DeprecationWarning, stacklevel=2)
        return getattr(self, new)

    def snapshot(self) -> Cache:
        """The cache as it is now; it stays so."""
        return select_rows(self.cache, range(len(self.cache.layers)), 0)

    def hits(self, steps: tuple[Run, ...], before: Cache, since: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For each token behind `since`, [tokens]: would a draft of `steps` have drafted it, and how sure was it?

        One pass over these tokens, on `before`: the snapshot taken when the text was `since` tokens long, its last
        token not in it. The text must have grown since.
        """
        prepared = self.runner.prepare(steps)
        rows = select_rows(before, prepared.draft.rows, 0)
        new = self.length - since + 1
        scores = self.runner.logits(prepared.draft, self.feed, self.ids, new, rows)[:-1]
        prepared.draft.forget()
        best, said = scores.max(-1)
        return said == self.ids[0, since:], (best - scores.logsumexp(-1)).exp()

    def agreement(self, steps: tuple[Run, ...], before: Cache, since: int) -> float:
        """The share of hits."""
        return float(self.hits(steps, before, since)[0].float().mean())
