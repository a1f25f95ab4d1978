"""Attention similarity: how far a layer's attention map is from that of the layer below."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.evaluation.distances import jensen_shannon
from shoal.evaluation.layer_pairs import LayerPairs, kept_tokens
from shoal.evaluation.mean_scores import mean_scores
from shoal.models.opened import open_model
from shoal.recording.attention import observe_maps
from shoal.scores import Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress
    from shoal.scores import Scores

TRAITS = Traits(null="none", least=False, first=1)


def attention_similarity(
    model: Any,
    data: Data,
    *,
    pairs: Literal["neighbours", "all"] = "neighbours",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The Jensen-Shannon divergence between the attention maps of a layer and of the one below, mean over queries.

    J_i = E_q[ JS(P_i(q), P_i-1(q)) ] / ln 2 in [0, 1], P_i [queries, keys] the mean over the heads of layer i's map, q
    all tokens but the first, JS(p, r) = (KL(p || m) + KL(r || m)) / 2 with m = (p + r) / 2. The lowest layer could
    best copy the map below it instead of computing its own; the first layer has none below and gets NaN. With
    `pairs="all"` the detail holds `matrix`, the divergence of every two layers. A diagnostic: a layer that could share
    its map cannot therefore be left out.

    Source: EchoAtt (2024, arXiv 2409.14595), which compares maps by their cosine.

    How we differ: the divergence is that of distributions and bounded; heads are averaged, since nothing pairs the
    heads of two layers; layers without attention are passed over. Memory: one layer's maps and the means of one batch,
    of all layers with `pairs="all"`. Raises U537 for a model that hands out no attention maps, U507 while a plan is
    running.
    """
    found = open_model(model).stack(stack)
    compared = LayerPairs[torch.Tensor](found.depth, every=pairs == "all")
    keep = torch.ones(1, 1, dtype=torch.bool)

    def before(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        nonlocal keep
        keep = kept_tokens(ids, mask, skip_first=1)
        compared.begin(keep.sum(-1).tolist())
        if progress is not None:
            progress(len(compared.counts), len(data), "attention similarity")

    def apart(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        found = jensen_shannon(mine, theirs.to(mine.device)).cpu().double() / math.log(2)
        return torch.where(keep, found, 0.0).sum(-1)

    def watch(index: int, maps: torch.Tensor) -> None:
        compared.add(index, maps.float().mean(1), apart)

    observe_maps(model, data.batches(batch), watch, what="attention similarity", before=before, stack=stack)
    return mean_scores(
        "attention-similarity", "Jensen-Shannon divergence / ln 2", compared.sums(), compared.counts, data,
        stack=found.name, removal=False,
        detail={"matrix": compared.matrix()} if pairs == "all" else {},
    )  # fmt: skip
