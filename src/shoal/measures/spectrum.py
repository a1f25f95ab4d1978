"""Spectrum: how heavy-tailed the spectra of a layer's weight matrices are, without any text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from shoal.models.matrices import layer_matrices, planes
from shoal.models.opened import open_model
from shoal.scores import Scores, Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress

TRAITS = Traits(null="zero matrices", text=False, errors=False)
WARNING = (
    "a claim about training, not a measurement of use: no text is looked at, and the paper that orders layers this way "
    "states an error in its implementation; compare it with a measure that runs the model before you trust it"
)
STARTS = 100
"""Lower ends of the tail that are tried for each matrix."""
LEAST = 8
"""Eigenvalues that a tail must hold."""


def spectrum(
    model: Any,
    data: Data | None = None,
    *,
    part: Literal["layer", "attention", "mlp"] = "layer",
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The tail index 1 / (alpha - 1) of the eigenvalues of each weight matrix, mean over a layer's matrices.

    For W [rows, columns] with eigenvalues l of W^T W: alpha = 1 + n / sum over the n eigenvalues l >= m of ln(l / m), m
    chosen so that the Kolmogorov-Smirnov distance between tail and power law is least (Clauset et al. 2009, arXiv
    0706.1062, equations 3.1 and 3.9). Heavy tails (a large index, alpha near 2) are taken as a sign of training, light
    ones (a small index) as a sign that the layer may go. The detail holds `alpha` by layer: one number for each matrix.

    Source: heavy-tailed self-regularisation (Martin and Mahoney 2021, arXiv 1810.01075), used to order layers by
    AEIUOrder (2023, arXiv 2302.02123), whose authors report an error in their implementation.

    How we differ: removal instead of order, the index instead of alpha so that the lowest goes first, all matrices of a
    layer weigh the same. A matrix of zeros has index 0. No text, so `data` and `batch` are not used and there is no
    error. Raises U534 for offloaded or quantised weights, U531 for parts that no layer has.
    """
    matrices = layer_matrices(model, "spectrum", part=part, stack=stack)
    indices: list[list[float]] = []
    for number, own in enumerate(matrices):
        indices.append([_tail_index(torch.linalg.svdvals(w).square()) for _, p in own for w in planes(p)])
        if progress is not None:
            progress(number + 1, len(matrices), "spectrum")
    values = tuple(math.fsum(own) / len(own) if own else math.nan for own in indices)
    return Scores(
        measure="spectrum",
        stack=open_model(model).stack(stack).name,
        unit="tail index",
        values=values,
        errors=(None,) * len(values),
        sequences=0,
        tokens=0,
        data="the weights alone, no text",
        notes=(WARNING,),
        detail={"alpha": [[1 + 1 / index if index else None for index in own] for own in indices]},
    )


def _tail_index(eigenvalues: torch.Tensor) -> float:
    """1 / (alpha - 1) of the best fitting tail of `eigenvalues` [number]; 0 for a matrix of zeros."""
    ordered = eigenvalues.cpu().double().sort(descending=True).values
    ordered = ordered[ordered > 0]
    if not len(ordered):
        return 0.0
    logs = ordered.log()
    sizes = torch.linspace(min(LEAST, len(logs)), len(logs), STARTS).round().long().unique()
    best, index = math.inf, 0.0
    for size in sizes.tolist():
        above = logs[:size] - logs[size - 1]
        mean = above.mean().item()
        if mean <= 0:
            continue
        # the fitted share of the tail beyond each eigenvalue against the counted one
        counted = torch.arange(1, size + 1, dtype=torch.float64) / size
        fitted = (-above / mean).exp()
        distance = torch.maximum((counted - fitted).abs(), (counted - 1 / size - fitted).abs()).max().item()
        if distance < best:
            best, index = distance, mean
    return index
