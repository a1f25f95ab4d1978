"""How a generation chooses its tokens and when it stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class GenerationSettings:
    """How tokens are chosen and when to stop: what `generate` prepared."""

    processors: Any
    criteria: Any
    sample: bool
    end: int
    """The length of text at which generation ends at the latest."""
    streamer: Any = None
    scores: list[torch.Tensor] | None = None
    logits: list[torch.Tensor] | None = None

    def processed(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Scores [1, vocabulary] that the next token behind `ids` is chosen by."""
        return self.processors(ids, logits) if len(self.processors) else logits
