"""Tokens as they are generated, for somebody who may have heard enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria

OnTokens = Callable[[list[int]], bool]
"""Called with the ids that are new, one or several; True ends the generation."""


class NewTokens(StoppingCriteria):
    """Hands the new tokens of one sequence on as soon as they are decided, and stops when it is told to.

    A stopping criterion, not a streamer: it is asked after every step of every way of decoding, assisted ones, which
    decide several tokens at a time, too; and it can stop. `prompt`: tokens of the prompt. Batches of one sequence only.
    """

    def __init__(self, prompt: int, on_tokens: OnTokens) -> None:
        self._seen, self._on_tokens = prompt, on_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Called by `generate` with ids [1, length]; bool [1]."""
        new: list[int] = input_ids[0, self._seen :].tolist()
        self._seen += len(new)
        return torch.full(input_ids.shape[:1], self._on_tokens(new), dtype=torch.bool, device=input_ids.device)
