"""What a parallel group makes of its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from shoal.plan import Parallel, Run
from shoal.plan.sources import KV

Calls = Callable[[Run, int, torch.Tensor], torch.Tensor]
"""(run, the number of its branch, the state that it reads) -> the state that it leaves, [batch, tokens, hidden]."""


def joined(step: Parallel, hidden: torch.Tensor, call: Calls) -> torch.Tensor:
    """The state behind the group, [batch, tokens, hidden], see `Parallel`."""
    if step.join == "bypass":
        return _bypassed(step, hidden, call)
    changes = [call(branch, n, hidden) - hidden for n, branch in enumerate(step.branches)]
    total = torch.stack(changes).sum(0)
    return hidden + (total / len(changes) if step.join == "mean" else total)


def _bypassed(step: Parallel, hidden: torch.Tensor, call: Calls) -> torch.Tensor:
    """The mlp of each branch behind what its own attention and those of the branches before it added."""
    seen = total = hidden
    for n, branch in enumerate(step.branches):
        wrote = call(replace(branch, part="attention"), n, hidden) - hidden
        seen = seen + wrote
        # an mlp reads no keys and values
        total = total + wrote + call(replace(branch, part="mlp", kv=KV()), n, seen) - seen
    return total
