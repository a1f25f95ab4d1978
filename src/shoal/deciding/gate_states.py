"""What gates read: the state of a token, or the mean of a sequence's prompt."""

from __future__ import annotations

import torch

from shoal.deciding.forward import ForwardView
from shoal.executing.exit_heads import scaled


def state_of(hidden: torch.Tensor) -> torch.Tensor:
    """States scaled to a root mean square of 1, float32 [batch, tokens, hidden]; of several streams the mean."""
    return scaled(hidden if hidden.dim() == 3 else hidden.flatten(0, -4).mean(0))


def prompt_mean(state: torch.Tensor, forward: ForwardView) -> torch.Tensor:
    """The mean over the real tokens of each row's prompt, [batch, 1, hidden], of states [batch, tokens, hidden]; a pass
    without a prompt's end, as in training, is its own prompt."""
    columns = min(forward.tokens, forward.tokens if forward.prompt is None else max(1, forward.prompt))
    real = torch.ones_like(state[..., 0]) if forward.real is None else forward.real.to(state)
    counted = real * (torch.arange(forward.tokens, device=state.device) < columns)
    mean = (state * counted[..., None]).sum(1) / counted.sum(1, keepdim=True).clamp(min=1)
    return mean[:, None]


def learns(forward: ForwardView) -> bool:
    """Whether decisions are to have gradients."""
    return forward.learning is not None and torch.is_grad_enabled()
