"""Sinks: which share of a layer's attention does more than rest on the first token."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from shoal.evaluation.mean_scores import mean_scores
from shoal.models.opened import open_model
from shoal.recording.attention import observe_maps
from shoal.scores import Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores

TRAITS = Traits(null="none", least=False)


def sinks(
    model: Any,
    data: Data,
    *,
    dormant: float = 0.8,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The share of attention that does not go to the first token of the sequence, mean over heads and queries.

    a_i = E_q,h[ 1 - P_i,h(q, first) ], P_i,h [queries, keys] the attention map of head h of layer i, q all tokens but
    the first. The detail holds `sink`, E_q[ P_i,h(q, first) ] by layer and head, and `dormant`, the [layer, head] pairs
    whose sink is at least `dormant`: heads that are switched off on this text. A diagnostic: a layer whose heads rest
    may do without its attention, which a removal has to show; the first token's key and value must then stay.

    Source: attention sinks (Xiao et al. 2023, arXiv 2309.17453), active and dormant heads (Guo et al. 2024, arXiv
    2410.13835).

    How we differ: the first real token counts as the first, padding is left out; standard errors are over sequences.
    Layers without attention, or whose window has lost the first token, score as what is seen. Memory: one layer's map
    at a time. Raises U537 for a model that hands out no attention maps, U507 while a plan is running.
    """
    found = open_model(model).stack(stack)
    heads: list[list[torch.Tensor]] = [[] for _ in range(found.depth)]
    counts: list[int] = []
    keep = torch.ones(1, 1, dtype=torch.bool)

    def before(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        nonlocal keep
        keep = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
        counts.extend((keep.sum(-1) - 1).tolist())
        if progress is not None:
            progress(len(counts), len(data), "sinks")

    def watch(index: int, maps: torch.Tensor) -> None:
        for row, real in enumerate(keep):
            first = int(real.int().argmax())
            queries = real.nonzero()[1:, 0].to(maps.device)
            heads[index].append(maps[row][:, queries, first].float().sum(-1).cpu().double())

    observe_maps(model, data.batches(batch), watch, what="sinks", before=before, stack=stack)
    nothing = [math.nan] * len(counts)
    sums = [[n - s.mean().item() for n, s in zip(counts, own, strict=True)] if own else nothing for own in heads]
    shares = [(torch.stack(own).sum(0) / max(1, sum(counts))).tolist() if own else [] for own in heads]
    asleep = [[i, h] for i, own in enumerate(shares) for h, share in enumerate(own) if share >= dormant]
    note = f"{len(asleep)} of {sum(map(len, shares))} heads rest on the first token with {dormant:g} of their attention"
    return mean_scores(
        "sinks", "share of attention", sums, counts, data, stack=found.name, removal=False, notes=(note,),
        detail={"sink": shares, "dormant": asleep},
    )  # fmt: skip
