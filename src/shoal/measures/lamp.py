"""LAMP: which share of a layer's weights a fair global pruning would keep."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.errors import UsageError
from shoal.models.matrices import layer_matrices, planes
from shoal.models.opened import open_model
from shoal.scores import Scores, Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress

TRAITS = Traits(null="zero matrices", text=False, errors=False)
LOW, HALF = 1 << 16, 16


def lamp(
    model: Any,
    data: Data | None = None,
    *,
    part: Literal["layer", "attention", "mlp"] = "layer",
    sparsity: float = 0.5,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The share of a layer's weights that is kept when the stack's weights are pruned together by LAMP scores.

    For the weights of one matrix in ascending order of size, s(u) = W_u^2 / sum over v >= u of W_v^2, so that the
    largest weight of every matrix scores 1 and none is emptied; the highest 1 - `sparsity` of all scores are kept, and
    K_i is the kept share of layer i. It says how much of a budget of weights or bits a layer wants; a layer of which
    little is kept is the next to go as a whole. A matrix of zeros scores 0.

    Source: Lee et al. 2021 (arXiv 2010.07611).

    How we differ: the paper prunes single weights by the scores, we report the allocation; experts are matrices of
    their own. The threshold is exact, found by counting the scores' float32 bits in two halves, with one matrix of
    scores held at a time; equal scores at the threshold are all kept. No text, so `data` and `batch` are not used and
    there is no error. Raises U535 for a sparsity outside 0 to 1, U534 for offloaded or quantised weights, U531 for
    missing parts.
    """
    if not 0 < sparsity < 1:
        raise UsageError(f"a sparsity of {sparsity} is not between 0 and 1; give the share to prune", code="U535")
    matrices = layer_matrices(model, "LAMP", part=part, stack=stack)
    total = sum(p.numel() for own in matrices for _, p in own)
    most = total - max(1, round(total * (1 - sparsity)))
    high = torch.zeros(len(matrices), LOW, dtype=torch.int64)
    for index, own in enumerate(matrices):
        for bits in (_bits(plane) for _, p in own for plane in planes(p)):
            high[index] += torch.bincount(bits >> HALF, minlength=LOW)
        if progress is not None:
            progress(index + 1, 2 * len(matrices), "LAMP")
    # the score with `most` scores below it, first its upper sixteen bits, then its lower ones
    below = high.sum(0).cumsum(0)
    upper = int(torch.searchsorted(below, most, right=True))
    low = torch.zeros(len(matrices), LOW, dtype=torch.int64)
    for index, own in enumerate(matrices):
        for bits in (_bits(plane) for _, p in own for plane in planes(p)):
            low[index] += torch.bincount(bits[bits >> HALF == upper] & (LOW - 1), minlength=LOW)
        if progress is not None:
            progress(len(matrices) + index + 1, 2 * len(matrices), "LAMP")
    rest = most - (int(below[upper - 1]) if upper else 0)
    lower = int(torch.searchsorted(low.sum(0).cumsum(0), rest, right=True))
    kept = (high[:, upper + 1 :].sum(-1) + low[:, lower:].sum(-1)).tolist()
    sizes = [sum(p.numel() for _, p in own) for own in matrices]
    values = tuple(k / size if size else math.nan for k, size in zip(kept, sizes, strict=True))
    return Scores(
        measure="lamp",
        stack=open_model(model).stack(stack).name,
        unit=f"share kept at sparsity {sparsity:g}",
        values=values,
        errors=(None,) * len(values),
        sequences=0,
        tokens=0,
        data="the weights alone, no text",
    )


def _bits(plane: torch.Tensor) -> torch.Tensor:
    """The LAMP scores of one matrix as the integers that their float32 bits spell, which keep the order."""
    squares = plane.flatten().cpu().double().square().sort().values
    behind = squares.flip(0).cumsum(0).flip(0)
    scores = torch.where(behind > 0, squares / behind, 0.0)
    return scores.float().view(torch.int32).long()
