"""The mean keys and values of each layer over many sequences, and how far layers are apart by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from shoal.executing.bind import bind
from shoal.executing.inputs import require_whole, run_stack
from shoal.executing.recorder import Recorder
from shoal.models.evaluating import evaluating
from shoal.models.opened import OpenedModel, open_model
from shoal.plan import Run

Means = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""By base layer its keys and values [heads, tokens, dim], the mean over sequences."""


@torch.no_grad()
def mean_kv(
    model: nn.Module | OpenedModel,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    *,
    what: str,
    before: Callable[[torch.Tensor], None],
    stack: str | None = None,
) -> Means:
    """Run `model` without its head on every batch of (ids, mask), [batch, length] each, and average at each place of a
    sequence what each layer attends to, over the sequences that have a token there. `before` is called with the ids of
    each batch. Sequences begin at the first place: those padded on the left are not compared with others.

    Raises U507, naming `what`, while a plan is running.
    """
    opened = open_model(model)
    require_whole(opened, what, stack)
    bound, seen = bind(opened), _Sums()
    with evaluating(opened.model), bound.running(), bound.executor(stack).recording(seen):
        for ids, mask in batches:
            before(ids)
            seen.real = torch.ones(ids.shape) if mask is None else mask.bool().float().cpu()
            run_stack(opened.model, opened.stack(stack), ids, mask)
    return {layer: _over(seen.counts[layer], *sums) for layer, sums in seen.sums.items()}


def kv_distances(means: Means) -> dict[tuple[int, int], float]:
    """For each two layers (later, earlier) with keys and values of one shape the mean over heads and tokens of
    |k_i - k_j|, averaged with the same of the values."""
    apart = {}
    for later, own in means.items():
        for earlier, other in means.items():
            if earlier < later and all(a.shape == b.shape for a, b in zip(own, other, strict=True)):
                both = [float((a - b.to(a.device)).norm(dim=-1).mean()) for a, b in zip(own, other, strict=True)]
                apart[later, earlier] = math.fsum(both) / 2
    return apart


def _over(count: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return keys / count.clamp(min=1), values / count.clamp(min=1)


class _Sums(Recorder):
    """Adds up what layers attend to."""

    def __init__(self) -> None:
        self.sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.counts: dict[int, torch.Tensor] = {}
        self.real = torch.ones(1, 1)

    def stores(self, run: Run, keys: torch.Tensor, values: torch.Tensor) -> None:
        real = self.real.to(keys.device)[:, None, :, None]
        count = real.sum(0)
        new = [(one.float() * real).sum(0) for one in (keys, values)]
        if run.layer in self.sums:
            old = self.sums[run.layer]
            self.sums[run.layer] = old[0] + new[0], old[1] + new[1]
            self.counts[run.layer] = self.counts[run.layer] + count
        else:
            self.sums[run.layer], self.counts[run.layer] = (new[0], new[1]), count
