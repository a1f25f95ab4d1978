"""What one forward under a policy has decided so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from shoal.deciding.gates import Decision, Moment
from shoal.deciding.kv_rules import Forward
from shoal.plan import Run, Step


@dataclass
class Flow:
    """What one forward has decided so far."""

    moment: Moment
    kv: Forward
    ids: torch.Tensor | None
    left: Decision = False
    """Which tokens have left at an exit."""
    kept: torch.Tensor | None = None
    """For those that have left: the state that final norm and head shall read."""
    before: torch.Tensor | None = None
    """The hidden state one run before."""
    depth: float = 0.0
    """Layers run by all tokens; `extra` [batch, tokens] has those that only some ran."""
    extra: torch.Tensor | None = None
    heads: list[tuple[Decision, str]] = field(default_factory=list)


def next_run(steps: tuple[Step, ...], position: int) -> int:
    """The position of the run behind `position`; the number of steps when there is none."""
    return next((at for at in range(position + 1, len(steps)) if isinstance(steps[at], Run)), len(steps))


def wide(where: Decision) -> torch.Tensor:
    """[batch or 1, tokens, 1]: a decision that is no bool, to be laid over hidden states."""
    assert isinstance(where, torch.Tensor)
    return where[..., None]
