"""A sum over tokens whose gradient is taken chunk by chunk, so that logits of all tokens never lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shoal.evaluation.scoring import chunks

Piece = Callable[[slice, torch.Tensor], torch.Tensor]
"""(which tokens, their states [n, hidden]) -> their sum, []."""


def summed(
    states: torch.Tensor, piece: Piece, vocabulary: int, *, most: int, learning: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """The sum of `piece` over states [tokens, hidden], at most `most` tokens at a time.

    The gradient of a chunk is taken in the forward and kept, [tokens, hidden] in all: what is computed on the way
    (logits and what the formula makes of them) is gone before the next chunk. Gradients reach `states` and, of what
    `piece` calls, the tensors that are `learning`: norm and head of the model stand still.
    """
    parts = [
        slice(start, min(start + most, part.stop))
        for part in chunks(len(states), vocabulary)
        for start in range(part.start, part.stop, most)
    ]
    if not torch.is_grad_enabled() or not (states.requires_grad or learning):
        return sum((piece(part, states[part]) for part in parts), states.new_zeros((), dtype=torch.float32))
    found: torch.Tensor = _Summed.apply(states, piece, parts, *learning)
    return found


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, piece: Piece, parts: list[slice], *learning: torch.Tensor
    ) -> torch.Tensor:
        total = states.new_zeros((), dtype=torch.float32)
        gradient, others = torch.zeros_like(states), [torch.zeros_like(one) for one in learning]
        for part in parts:
            with torch.enable_grad():
                chunk = states[part].detach().requires_grad_()
                value = piece(part, chunk)
            gradient[part], *found = torch.autograd.grad(value, (chunk, *learning), allow_unused=True)
            for own, more in zip(others, found, strict=True):
                own.add_(0 if more is None else more)
            total += value.detach()
        ctx.save_for_backward(gradient, *others)
        return total

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> tuple[Any, ...]:
        gradient, *others = ctx.saved_tensors
        return gradient * above[0].to(gradient.dtype), None, None, *(one * above[0].to(one.dtype) for one in others)
