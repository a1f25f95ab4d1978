"""What every decoding loop does with scores and tokens: choose, append, tell the streamer, ask whether to stop."""

from __future__ import annotations

from typing import Any

import torch


def next_tokens(scores: torch.Tensor, sample: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens [batch] by processed scores [batch, vocabulary], and the probabilities when they were drawn by them."""
    if not sample:
        return scores.argmax(dim=-1), None
    chances = scores.softmax(dim=-1)
    return torch.multinomial(chances, num_samples=1).squeeze(1), chances


class GrowingText:
    """The token ids [batch, length] of one generation while it grows, and which of its rows are unfinished."""

    def __init__(
        self, ids: torch.Tensor, stopping_criteria: Any, streamer: Any = None, pad: torch.Tensor | None = None
    ) -> None:
        """`pad`: what a finished row is filled with; None where nothing ends a row before the others."""
        self.ids, self.criteria, self.streamer, self.pad = ids, stopping_criteria, streamer, pad
        self._unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
        self.done = False

    def add(self, tokens: torch.Tensor, scores: Any = None) -> None:
        """Append `tokens` [batch]; `scores`: all of this generation so far, for criteria that read them."""
        if self.pad is not None:
            tokens = tokens * self._unfinished + self.pad * (1 - self._unfinished)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())
        self._unfinished = self._unfinished & ~self.criteria(self.ids, scores)
        self.done = not bool(self._unfinished.any())

    def end(self) -> None:
        """Tell the streamer that this was all."""
        if self.streamer is not None:
            self.streamer.end()
