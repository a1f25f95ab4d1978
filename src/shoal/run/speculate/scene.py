"""What a chooser may look at before a round: the text, the cache behind it, and single layers tried on single states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from shoal.plan.steps import Run
from shoal.run.speculate.account import Stats
from shoal.run.speculate.bench import Bench
from shoal.run.speculate.feed import Feed
from shoal.run.speculate.rows import lent
from shoal.run.speculate.stage import Stage


@dataclass(frozen=True)
class Scene:
    """The moment before a round. The last token of `ids`, [1, length], is not in the cache yet."""

    stage: Stage
    feed: Feed
    cache: Cache
    ids: torch.Tensor
    stats: Stats

    @property
    def length(self) -> int:
        """Tokens of text so far."""
        return int(self.ids.shape[1])

    def bench(self) -> Bench:
        """Single layers, to be tried on states of the last token."""
        return Bench(self.stage, self.feed, self.cache, self.ids)

    def snapshot(self) -> Cache:
        """The cache as it is now; it stays so."""
        return lent(self.cache, range(len(self.cache.layers)), 0)

    def agreement(self, steps: tuple[Run, ...], before: Cache, since: int) -> float:
        """Share of the tokens behind `since` that a draft of `steps` would have drafted, in one pass over them.

        `before`: the snapshot taken when the text was `since` tokens long. The text must have grown since.
        """
        ready = self.stage.prepare(steps)
        new = self.length - since + 1
        rows: Any = lent(before, ready.draft.rows, 0)
        scores = self.stage.logits(ready.draft, self.feed, self.ids, new, rows)
        said = scores[:-1].argmax(-1)
        return float((said == self.ids[0, since:]).float().mean())
