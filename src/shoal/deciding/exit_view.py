"""What a policy can see at an exit: the state, and what the model would say if it stopped there."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

ELEMENTS = 1 << 24
"""Logits held at a time."""


class ExitView:
    """What can be seen at an exit; norm and head run once, when somebody asks for something that needs them."""

    hidden: torch.Tensor
    """[batch, tokens, hidden]"""

    def __init__(
        self,
        hidden: torch.Tensor,
        before: torch.Tensor | None,
        read: Callable[[torch.Tensor, slice], torch.Tensor],
        unit: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.hidden, self.before, self._read, self._unit = hidden, before, read, unit
        self._found: dict[str, torch.Tensor] = {}

    def read(self, what: str) -> torch.Tensor:
        """[batch, tokens]: "probability" of the likeliest token, its "margin" over the second, "certainty" (1 - entropy
        over the log of the vocabulary), "choice" (the likeliest token), "saturation" (cosine to the state one layer
        before), "probe" or "halting" (what the exit's own probe or halting unit makes of the state)."""
        if what == "saturation":
            return _cosine(self.before, self.hidden)
        if what in ("probe", "halting"):
            assert self._unit is not None  # U623 or U684 was raised before anything ran
            return self._unit(what, self.hidden)
        if not self._found:
            self._found = self._looked()
        return self._found[what]

    def _looked(self) -> dict[str, torch.Tensor]:
        found: list[dict[str, torch.Tensor]] = []
        tokens, step = self.hidden.shape[-2], 0
        at = 0
        while at < tokens:
            # the first column tells how long a column of logits is
            columns = slice(at, at + max(1, step))
            states = self.hidden[..., columns, :]
            logits = self._read(states, columns).float()
            found.append(confidence_of(logits))
            at += states.shape[-2]
            step = max(1, ELEMENTS // (logits.shape[0] * logits.shape[-1]))
        return {name: torch.cat([one[name] for one in found], -1) for name in found[0]}


def confidence_of(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """What policies read off logits [..., vocabulary]: "probability", "margin", "certainty" and "choice", [...]."""
    logs = logits.log_softmax(-1)
    top = logs.topk(2, -1)
    first, second = top.values.exp().unbind(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    return {
        "probability": first,
        "margin": first - second,
        "certainty": 1 - entropy / math.log(logits.shape[-1]),
        "choice": top.indices[..., 0],
    }


def _cosine(before: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    """Cosine of each token's state to the one a layer before, in float32; no layer before: 0."""
    if before is None:
        return hidden.new_zeros(hidden.shape[-3:-1])
    found = nn.functional.cosine_similarity(before.to(hidden.device).float(), hidden.float(), dim=-1)
    return found if found.dim() == 2 else found.mean(0)
