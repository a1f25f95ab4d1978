"""A sum over tokens whose gradient is taken chunk by chunk, so that logits of all tokens never lie in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shoal.evaluation.scoring import chunks

Piece = Callable[[slice, torch.Tensor], torch.Tensor]
"""(which tokens, their states [n, hidden]) -> their sum, []."""


def summed(states: torch.Tensor, piece: Piece, vocabulary: int, *, most: int) -> torch.Tensor:
    """The sum of `piece` over states [tokens, hidden], at most `most` tokens at a time.

    The gradient of a chunk is taken in the forward and kept, [tokens, hidden] in all: what is computed on the way
    (logits and what the formula makes of them) is gone before the next chunk. Gradients reach `states` alone: norm and
    head, which `piece` calls, stand still.
    """
    parts = [
        slice(start, min(start + most, part.stop))
        for part in chunks(len(states), vocabulary)
        for start in range(part.start, part.stop, most)
    ]
    if not torch.is_grad_enabled() or not states.requires_grad:
        return sum((piece(part, states[part]) for part in parts), states.new_zeros((), dtype=torch.float32))
    found: torch.Tensor = _Summed.apply(states, piece, parts)
    return found


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, piece: Piece, parts: list[slice]) -> torch.Tensor:
        total = states.new_zeros((), dtype=torch.float32)
        gradient = torch.zeros_like(states)
        for part in parts:
            with torch.enable_grad():
                chunk = states[part].detach().requires_grad_()
                value = piece(part, chunk)
            (gradient[part],) = torch.autograd.grad(value, chunk)
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * above[0].to(gradient.dtype), None, None
