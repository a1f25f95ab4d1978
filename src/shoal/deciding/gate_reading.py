"""What learned gates read: the state of each token, or the mean of a prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shoal.deciding.forward import ForwardView
from shoal.executing.exit_heads import scaled


def state_read(hidden: torch.Tensor) -> torch.Tensor:
    """The states scaled to a root mean square of 1, float32 [batch, tokens, hidden]; of several streams the mean."""
    return scaled(hidden if hidden.dim() == 3 else hidden.flatten(0, -4).mean(0))


def prompt_mean(state: torch.Tensor, forward: ForwardView) -> torch.Tensor:
    """The mean over the real tokens of each row's prompt, [batch, 1, hidden], of states [batch, tokens, hidden]; a pass
    without a prompt's end, as in training, is its own prompt."""
    columns = min(forward.tokens, forward.tokens if forward.prompt is None else max(1, forward.prompt))
    real = torch.ones_like(state[..., 0]) if forward.real is None else forward.real.to(state)
    counted = real * (torch.arange(forward.tokens, device=state.device) < columns)
    mean = (state * counted[..., None]).sum(1) / counted.sum(1, keepdim=True).clamp(min=1)
    return mean[:, None]


def once_for_rows(gate: str, forward: ForwardView, decide: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `decide` says of each row, kept beside the cache until the sequences end; runs behind one gate share it."""
    kept: dict[str, torch.Tensor] = forward.memory.setdefault("scores", {})
    asked: set[str] = forward.notes.setdefault("asked", set())
    if gate not in kept or (forward.past == 0 and gate not in asked):
        kept[gate] = decide()
        asked.add(gate)
    return kept[gate]


def learns(forward: ForwardView) -> bool:
    """Whether decisions are to have gradients."""
    return forward.learning is not None and torch.is_grad_enabled()
