"""Anchors: of the prompt the keys and values of a few tokens are held, the same ones in every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shoal.compressing.job import CacheJob
from shoal.compressing.row import CompressedRow
from shoal.errors import PlanError, UsageError
from shoal.examples import CacheExamples, Refusal

EXAMPLES = CacheExamples(
    texts=("anchors:every=4", "anchors:every=3,first=1", "anchors:tokens=5,7,9,11"),
    null=("anchors:every=1",),
    refused=(
        Refusal("no distance", "anchors:every=0", "U659", "every 0 tokens"),
        Refusal("no number of first tokens", "anchors:first=-1", "U659", "first -1"),
        Refusal("windows", "anchors", "P161", "window of 6 tokens", family="qwen2"),
    ),
)


def anchors(job: CacheJob, *, tokens: tuple[int, ...] | None = None, every: int = 4, first: int = 0) -> list[Any]:
    """Hold, of the prompt, the keys and values of its anchors, and of what stands behind the last one.

    The prompt is cut into chunks, each of which ends with an anchor: a token whose id is among `tokens` (line ends,
    say), or the last of each `every` tokens. After the prefill every row holds the anchors, the `first` tokens, and the
    chunk that is not ended yet; later tokens are held as they come, and keep their positions. The prompt attends to all
    of itself.

    Source: AnchorCoder (Zhang et al. 2024, arXiv 2411.06680), its token-wise anchors, as far as inference goes.

    How we differ: that model is trained so that an anchor takes in its chunk, which no plain checkpoint does; its
    layer-wise anchors, by which a layer reads those of an earlier one, are new parameters and are left out. Chunks of
    generated tokens are not cut. A batch whose sequences would hold different numbers of tokens is refused (P161), as
    are rows with windows or a recurrent state.
    """
    if every < 1 or first < 0:
        raise UsageError(
            f"anchors cannot hold the first {first} and one of every {every} tokens; use 0 or more, and 1 or more",
            code="U659",
        )
    job.require_plain("anchors", range(len(job.rows)))
    chosen = _Chosen(job, tokens, every, first)
    return [_AnchoredRow(chosen) for _ in job.rows]


class _Chosen:
    """Which columns of the prompt are held."""

    def __init__(self, job: CacheJob, tokens: Sequence[int] | None, every: int, first: int) -> None:
        self.tokens, self.every, self.first = tokens, every, first
        self.real, self.ids = job.real, job.ids
        known = self.ids if self.real is None else self.real
        if known is not None:
            self.columns(*known.shape)  # refused before anything runs

    def columns(self, batch: int, length: int) -> torch.Tensor:
        """Column numbers, int64 [batch, held], in order."""
        real = torch.ones(batch, length, dtype=torch.bool) if self.real is None else self.real.cpu()
        place = real.cumsum(1) - 1
        if self.tokens is None:
            anchor = (place + 1) % self.every == 0
        elif self.ids is None or self.ids.shape != (batch, length):
            raise PlanError(
                f"anchors by their tokens need the ids of the prompt, {(batch, length)}; give them with the cache "
                "(make_cache(..., ids=input_ids)), or take anchors:every=4",
                code="P161",
            )
        else:
            anchor = torch.isin(self.ids.cpu(), torch.tensor(self.tokens))
        anchor = anchor & real
        behind = anchor.flip(1).cumsum(1).flip(1) == 0
        held = (anchor | behind | (place < self.first)) & real
        if torch.equal(held, real):
            held = torch.ones_like(real)  # where every token is held, padding may be too
        counts = sorted(set(held.sum(1).tolist()))
        if len(counts) > 1:
            raise PlanError(
                f"the sequences of this batch would hold {counts[0]} to {counts[-1]} tokens each, and rows of a cache "
                "have one length; give the sequences one at a time",
                code="P161",
            )
        return held.nonzero()[:, 1].view(batch, -1)


class _AnchoredRow(CompressedRow):
    def __init__(self, chosen: _Chosen) -> None:
        super().__init__()
        self.chosen, self.tokens = chosen, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store what is new, of the prompt its anchors, and answer with what is held and all that is new."""
        keys, values = super().update(key_states, value_states)
        if not self.tokens:
            batch, _, length, _ = key_states.shape
            self.token_size = key_states[:, :, :1].numel() + value_states[:, :, :1].numel()
            columns = self.chosen.columns(batch, length).to(keys.device)[:, None, :, None]
            self.keys, self.values = (
                one.gather(2, columns.expand(-1, one.shape[1], -1, one.shape[3])) for one in (keys, values)
            )
        self.tokens += key_states.shape[-2]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # the columns in front of a query are those that are held: as many places before it, none of them padding
        held = 0 if self.keys is None else self.keys.shape[-2]
        return held + query_length, self.tokens - held

    def reset(self) -> None:
        super().reset()
        self.tokens = 0
