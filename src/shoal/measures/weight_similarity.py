"""Weight similarity: how far a layer's matrices are from those of the layer below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.models.matrices import Matrices, layer_matrices, planes
from shoal.models.opened import open_model
from shoal.models.precision import in_float64
from shoal.scores import Scores, Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress

TRAITS = Traits(null="none", least=False, text=False, errors=False, first=1)
_PIECE = 1 << 16
"""Values of a matrix that are held in float64 at a time, for every layer."""


def weight_similarity(
    model: Any,
    data: Data | None = None,
    *,
    part: Literal["layer", "attention", "mlp"] = "layer",
    by: Literal["scale", "least-squares"] = "scale",
    pairs: Literal["neighbours", "all"] = "neighbours",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """What is left of a layer's matrices, as a share of them, when those of the layer below have been fitted to them.

    d(i, j) = mean over the matrices N, each weighted by its number of values, of min_s |W_iN - s W_jN|_F / |W_iN|_F =
    sqrt(1 - c^2), c = <W_iN, W_jN> / (|W_iN| |W_jN|) their cosine; layer i gets d(i, i - 1), the first NaN. 0 for two
    layers with the same matrices up to a factor, 1 for two that have nothing in common, where each cosine is 0. Of two
    layers only matrices of one name and shape are compared, NaN where there are none; a matrix of zeros is at 0 from
    another of zeros, at 1 from any other. `by="least-squares"`: the best map in place of s, on the shorter side of the
    matrix: min_A |W_i - A W_j| with A [rows, rows] for fewer rows than columns, min_B |W_i - W_j B| with B [columns,
    columns] for fewer columns. Square matrices, which some map always fits, are left out of it. With `pairs="all"` the
    detail holds `matrix`, d of every two layers, and `cosine`, by matrix the cosine of every two. A diagnostic: how
    much a tie of two layers leaves to be made up for.

    Source: our own; layers are tied from such pairs in Bae et al. 2024 (Relaxed Recursive Transformers, arXiv
    2410.20672).

    How we differ: nothing to differ from. Vectors such as norms and biases do not count. It looks at no text, so `data`
    and `batch` are not used and there is no error. Raises U534 for offloaded or quantised weights, U531 for parts that
    no layer has.
    """
    matrices = layer_matrices(model, "weight similarity", part=part, stack=stack)
    owners: dict[tuple[str, torch.Size], dict[int, torch.nn.Parameter]] = {}
    for layer, own in enumerate(matrices):
        for name, parameter in own:
            owners.setdefault((name, parameter.shape), {})[layer] = parameter
    depth = len(matrices)
    total, weight = torch.zeros(2, depth, depth, dtype=torch.float64)
    cosines: dict[str, list[list[float]]] = {}
    for done, ((name, shape), owned) in enumerate(owners.items(), 1):
        places = torch.tensor(list(owned))
        cosine = _cosines(list(owned.values()))
        apart = (1 - cosine.square()).clamp(min=0).sqrt()
        if by == "least-squares":
            apart = _unmapped(list(owned.values()), every=pairs == "all")
        known = ~apart.isnan()
        total[places[:, None], places] += torch.where(known, apart, 0.0) * shape.numel()
        weight[places[:, None], places] += known * float(shape.numel())
        label = name if name not in cosines else f"{name} {list(shape)}"
        cosines[label] = _placed(cosine, places, depth)
        if progress is not None:
            progress(done, len(owners), "weight similarity")
    mean = torch.where(weight > 0, total / weight, math.nan)
    return Scores(
        measure="weight-similarity",
        stack=open_model(model).stack(stack).name,
        unit="share that does not fit" if by == "scale" else "share that no map fits",
        values=(math.nan, *mean.diagonal(-1).tolist()),
        errors=(None,) * depth,
        sequences=0,
        tokens=0,
        data="the weights alone, no text",
        notes=_left_out(matrices, by),
        detail={"matrix": mean.tolist(), "cosine": cosines} if pairs == "all" else {},
        removal=False,
    )


def _cosines(own: Sequence[torch.Tensor]) -> torch.Tensor:
    """The cosine of every two of these tensors of one shape, float64 [tensors, tensors]; 1 for two of zeros, 0 for one
    of zeros and another."""
    flat = [one.detach().flatten() for one in own]
    gram = torch.zeros(len(own), len(own), dtype=torch.float64)
    for start in range(0, flat[0].numel(), _PIECE):
        piece = torch.stack([in_float64(one[start : start + _PIECE]).cpu() for one in flat])
        gram += piece @ piece.T
    norms = gram.diagonal().sqrt()
    empty = norms == 0
    cosine = gram / torch.outer(norms, norms)
    return torch.where(empty[:, None] | empty, (empty[:, None] & empty).to(cosine.dtype), cosine)


def _unmapped(own: Sequence[torch.Tensor], *, every: bool) -> torch.Tensor:
    """The share of each of these tensors that no map of each other one fits, float64 [tensors, tensors]; NaN for those
    that are square, and, unless `every` pair is asked for, beside the diagonal below."""
    found = torch.full((len(own), len(own)), math.nan, dtype=torch.float64)
    rows, columns = own[0].shape[-2:]
    if rows == columns:
        return found
    for j, other in enumerate(own):
        wide = [plane if rows < columns else plane.T for plane in planes(other)]
        bases = [_basis(plane) for plane in wide]
        for i, one in enumerate(own):
            if not every and i - j != 1:
                continue
            left = whole = 0.0
            for plane, basis in zip(planes(one), bases, strict=True):
                turned = plane if rows < columns else plane.T
                # the rest itself: a difference of two sums of squares would have no digit left for equal layers
                left += float((turned - (turned @ basis.to(turned.device)) @ basis.T.to(turned.device)).square().sum())
                whole += float(turned.square().sum())
            found[i, j] = math.sqrt(left / whole) if whole else float(any(basis.shape[1] for basis in bases))
    return found


def _basis(wide: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span the rows of `wide` [rows, columns], as many as its rank."""
    _, values, right = torch.linalg.svd(wide, full_matrices=False)
    return right[values > values[0] * max(wide.shape) * torch.finfo(wide.dtype).eps].T


def _placed(cosine: torch.Tensor, places: torch.Tensor, depth: int) -> list[list[float]]:
    """The cosines of some layers among all, NaN for the others."""
    whole = torch.full((depth, depth), math.nan, dtype=torch.float64)
    whole[places[:, None], places] = cosine
    found: list[list[float]] = whole.tolist()
    return found


def _left_out(matrices: Matrices, by: str) -> tuple[str, ...]:
    square = sorted({name for own in matrices for name, one in own if one.shape[-1] == one.shape[-2]})
    if by == "scale" or not square:
        return ()
    return (f"left out, as some map always fits them: {', '.join(square)}",)
