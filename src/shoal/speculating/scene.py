"""What a chooser may look at before a round: the text, the cache behind it, and single layers at the last token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from shoal.plan.steps import Run
from shoal.speculating.account import Stats
from shoal.speculating.bench import Bench
from shoal.speculating.feed import Feed
from shoal.speculating.rows import lent
from shoal.speculating.stage import Stage
from shoal.speculating.watch import Watch


@dataclass(frozen=True)
class Scene:
    """The moment before a round. The last token of `ids`, [1, length], is not in the cache yet."""

    stage: Stage
    feed: Feed
    cache: Cache
    ids: torch.Tensor
    stats: Stats
    watch: Watch | None = None

    @property
    def length(self) -> int:
        """Tokens of text so far."""
        return int(self.ids.shape[1])

    def bench(self) -> Bench:
        """Single layers, to be tried on states of the last token."""
        return Bench(self.stage, self.feed, self.cache, self.ids)

    def watched(self) -> torch.Tensor | None:
        """For each token written since this was last asked, the newest last, and each layer that the chooser `watches`:
        is it what final norm and head make of the state behind it? bool [layers, tokens], of at most 8 tokens; None
        for none.

        The states are those of the verification, so this costs no layer, one call of the head for all.
        """
        states = None if self.watch is None else self.watch.take()
        if states is None:
            return None
        said = self.stage.readout(torch.cat(states, -2)).argmax(-1)[0]
        wrote = self.ids[0, -states[0].shape[-2] :]
        return said.view(len(states), -1) == wrote

    def snapshot(self) -> Cache:
        """The cache as it is now; it stays so."""
        return lent(self.cache, range(len(self.cache.layers)), 0)

    def hits(self, steps: tuple[Run, ...], before: Cache, since: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For each token behind `since`, [tokens]: would a draft of `steps` have drafted it, and how sure was it?

        One pass over these tokens, on `before`: the snapshot taken when the text was `since` tokens long, its last
        token not in it. The text must have grown since.
        """
        ready = self.stage.prepare(steps)
        rows = lent(before, ready.draft.rows, 0)
        new = self.length - since + 1
        scores = self.stage.logits(ready.draft, self.feed, self.ids, new, rows)[:-1]
        ready.draft.forget()
        best, said = scores.max(-1)
        return said == self.ids[0, since:], (best - scores.logsumexp(-1)).exp()

    def agreement(self, steps: tuple[Run, ...], before: Cache, since: int) -> float:
        """The share of hits."""
        return float(self.hits(steps, before, since)[0].float().mean())
