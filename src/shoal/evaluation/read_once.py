"""Perplexity and agreement of a model whose layers lie in files: each is read once for all windows, not once for each.

The figures are those of `perplexity` and `compare` bit for bit: every layer is called on the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from shoal.data import Data
from shoal.evaluation.agreement import Comparison, Context, Logits, compare, compare_sides
from shoal.evaluation.layer_major_loss import At, LayerMajorLoss
from shoal.evaluation.perplexity import Perplexity, perplexity, summarise
from shoal.evaluation.plan_loss import PlanLoss
from shoal.evaluation.scoring import Progress, batch_tokens, logits_of, require_context, require_scored, windows
from shoal.models.opened import open_model
from shoal.models.streamed import is_streamed
from shoal.plan import Plan


def perplexity_read_once(model: Any, data: Data, *, batch: int = 1, progress: Progress | None = None) -> Perplexity:
    """`perplexity(model, data)` of the whole model, its layers read once where they lie in files; window by window
    where they do not, or where more than the hidden state goes from layer to layer. Raises what that raises, and U576
    for states that fit nowhere."""
    with _ends(model, data, [], batch, progress) as at:
        if at is None:
            return perplexity(model, data, batch=batch, progress=progress)
        scored: list[tuple[float, int]] = []
        for number, (ids, mask, keep) in enumerate(windows(data, batch, progress, "perplexity")):
            with at(0, number):
                sums = batch_tokens(model, ids, mask, keep).sum(-1)
            scored += zip(sums.tolist(), keep.sum(-1).tolist(), strict=True)
    require_scored(sum(count for _, count in scored), data)
    return summarise(scored, data.info)


def compare_read_once(
    model: Any, data: Data, plan: Plan, pruned: Context, *, batch: int = 1, progress: Progress | None = None
) -> Comparison:
    """`compare` of the whole model with itself under `plan`, which the context `pruned` runs; layers that lie in files
    are read once where the plan is layers and parts of layers, each in its place, and else window by window."""
    with _ends(model, data, [plan], batch, progress) as at:
        if at is None:
            return compare(model, data, dense=nullcontext, pruned=pruned, batch=batch, progress=progress)
        return compare_sides(_side(model, at, 0), _side(model, at, 1), data, batch, progress)


def _side(model: Any, at: At, place: int) -> Logits:
    """The logits of one plan, asked for in the order of the windows."""
    done: list[None] = []

    def logits(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        with at(place, len(done)):
            found = logits_of(model, ids, mask)
        done.append(None)
        return found

    return logits


@contextmanager
def _ends(model: Any, data: Data, plans: list[Plan], batch: int, progress: Progress | None) -> Iterator[At | None]:
    """Where forwards end as under the whole model and under each of `plans`; None where that cannot be had."""
    opened = open_model(model)
    if not all(map(is_streamed, opened.stacks)):
        yield None
        return
    require_context(model, data.ids.shape[1])
    sides = [Plan.identity(opened.spec), *plans]
    loss = LayerMajorLoss(PlanLoss(model, data, batch=batch))
    if not loss.takes(sides):
        yield None
        return
    depth = loss.stack.depth
    report = None if progress is None else lambda done: progress(done, depth, "layers read")
    with loss.at_their_ends(sides, list(data.batches(batch)), report) as at:
        yield at
