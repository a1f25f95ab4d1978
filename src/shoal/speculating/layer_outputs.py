"""Outputs of some layers in the verifications of a generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from shoal.models.stacks import Stack

MOST = 8
"""Tokens whose states are kept until `take` is called."""


class LayerOutputs:
    """`with outputs:` hooks on `layers` keep their outputs; `keep_accepted` says which of them belong to the text.

    In a round a shared layer sees the drafted tokens one by one and never again; any other is last called for the
    verification. Either way its newest outputs are those of the verified tokens, in their order.
    """

    def __init__(self, stack: Stack, layers: Sequence[int]) -> None:
        self.stack, self.layers = stack, layers
        self._round: list[list[torch.Tensor]] = [[] for _ in layers]
        self._kept: list[torch.Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> LayerOutputs:
        for place, layer in enumerate(self.layers):
            self._handles.append(self.stack.layer(layer).register_forward_hook(self._hook(place)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, place: int) -> Callable[..., None]:
        def seen(_: nn.Module, __: Any, out: Any) -> None:
            self._round[place].append(out[0] if isinstance(out, tuple | list) else out)

        return seen

    def keep_accepted(self, new: int, places: Sequence[int]) -> None:
        """A round is over that verified `new` tokens; behind those at `places` a token was written."""
        outputs = [torch.cat(found, -2)[..., -new:, :][..., list(places), :] for found in self._round]
        before = self._kept or [one[..., :0, :] for one in outputs]
        self._kept = [torch.cat(pair, -2)[..., -MOST:, :] for pair in zip(before, outputs, strict=True)]
        for found in self._round:
            found.clear()

    def take(self) -> list[torch.Tensor] | None:
        """For each layer [..., 1, tokens, hidden]: states behind it at the tokens settled since the last call."""
        states, self._kept = self._kept, []
        return states or None
