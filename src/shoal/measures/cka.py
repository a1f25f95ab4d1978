"""CKA: how alike the geometry of a layer's input and output is, whatever rotation lies between them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.evaluation.alignment import EveryAlignment, centred_gram, independence, misalignment, require_tokens
from shoal.evaluation.layer_pairs import kept_tokens
from shoal.evaluation.stats import bootstrap
from shoal.executing.inputs import require_whole
from shoal.models.opened import open_model
from shoal.recording.observe import observe
from shoal.scores import Scores

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress


def cka(
    model: Any,
    data: Data,
    *,
    part: Literal["layer", "attention", "mlp"] = "layer",
    pairs: Literal["neighbours", "all"] = "neighbours",
    skip_first: int = 1,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """1 minus the linear centred kernel alignment between a layer's input and output.

    CKA_i = sum_s H(K_s, L_s) / sqrt( sum_s H(K_s, K_s) x sum_s H(L_s, L_s) ) over sequences s, K_s = X X^T and L_s = Y
    Y^T [tokens, tokens], X and Y [tokens, hidden] the input and output of layer i (or of its attention or mlp, as in
    block influence), H the unbiased Hilbert-Schmidt independence criterion. 0 for a layer that adds nothing, but also
    for one that only rotates: what is alike here may be replaced by a linear map rather than left out. With
    `pairs="all"` the detail holds `matrix`, the CKA of every two of the layers' inputs and the last output.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), summed over batches as by Nguyen et al. 2021 (arXiv 2010.15327).

    How we differ: a sequence is a batch; padding and the first `skip_first` tokens, one of which can be the whole
    alignment, are left out; float64; standard errors by bootstrap over sequences. Raises U536 for sequences of fewer
    than four tokens, U531 for missing parts, U507 while a plan is running.
    """
    require_whole(model, "CKA", stack)
    found = open_model(model).stack(stack)
    # by layer and sequence: H(K, L), H(K, K), H(L, L)
    triples: list[list[list[float]]] = [[] for _ in range(found.depth)]
    seen = EveryAlignment(found.depth + 1) if pairs == "all" and part == "layer" else None
    keep = torch.ones(1, 1, dtype=torch.bool)
    counts: list[int] = []

    def before_layer(ids: torch.Tensor, mask: torch.Tensor | None, _: int) -> None:
        nonlocal keep
        keep = kept_tokens(ids, mask, skip_first=skip_first)

    def before(ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        before_layer(ids, mask, 0)
        counts.extend(keep.sum(-1).tolist())
        require_tokens(counts, skip_first)
        if seen is not None:
            seen.close()
        if progress is not None:
            progress(len(counts), len(data), "CKA")

    def watch(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        for row, real in enumerate(keep):
            k, m = (centred_gram(state[row].cpu()[real]) for state in (x, y))
            triples[index].append([independence(k, m), independence(k, k), independence(m, m)])
            if seen is not None:
                seen.add(row, index, k)
                if index == found.depth - 1:
                    seen.add(row, index + 1, m)

    # the matrix needs all layers of one sequence together
    by_layer = None if seen is not None else before_layer
    observe(
        model,
        data.batches(batch),
        watch,
        before=before,
        before_layer=by_layer,
        progress=progress,
        stack=stack,
        part=part,
    )
    values, errors = [], []
    for own in triples:
        known = torch.tensor(own, dtype=torch.float64).numpy() if own else None
        values.append(math.nan if known is None else misalignment(known.sum(0)).item())
        errors.append(None if known is None else bootstrap(known, misalignment))
    return Scores(
        measure="cka",
        stack=found.name,
        unit="1 - CKA",
        values=tuple(values),
        errors=tuple(errors),
        sequences=len(counts),
        tokens=sum(counts),
        data=data.info.describe(),
        notes=(f"the first {skip_first} tokens of each sequence left out",),
        detail={} if seen is None else {"matrix": seen.matrix()},
    )
