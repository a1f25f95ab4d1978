"""Magnitude: how large a layer's weights are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from shoal.models.matrices import layer_matrices
from shoal.models.opened import open_model
from shoal.scores import Scores, Traits

if TYPE_CHECKING:
    from shoal.data import Data
    from shoal.evaluation import Progress

TRAITS = Traits(null="zero matrices", text=False, errors=False)


def magnitude(
    model: Any,
    data: Data | None = None,
    *,
    part: Literal["layer", "attention", "mlp"] = "layer",
    power: Literal[1, 2] = 1,
    stack: str | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Scores:
    """The sum of the absolute weights of a layer's matrices (or of its attention or mlp), or of their squares.

    M_i = sum over the matrices W of layer i and their entries of |W_jk|^power; norms and biases do not count.

    Source: the magnitude criterion of Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834), after Li et al. 2017 (arXiv
    1608.08710).

    How we differ: nothing known. It looks at no text, so `data` and `batch` are not used and there is no error; a
    larger layer scores more for its size alone; weights behind a norm may be large and do little: it is here to be
    compared with, not to be trusted. Raises U534 for offloaded or quantised weights, U531 for parts that no layer has.
    """
    values = []
    matrices = layer_matrices(model, "magnitude", part=part, stack=stack)
    for index, own in enumerate(matrices):
        # by row, since a float32 sum over a whole matrix loses digits
        sums = [p.detach().float().abs().pow(power).sum(-1).cpu().double().sum().item() for _, p in own]
        values.append(math.fsum(sums) if own else math.nan)
        if progress is not None:
            progress(index + 1, len(matrices), "magnitude")
    return Scores(
        measure="magnitude",
        stack=open_model(model).stack(stack).name,
        unit="sum of absolute weights" if power == 1 else "sum of squared weights",
        values=tuple(values),
        errors=(None,) * len(values),
        sequences=0,
        tokens=0,
        data="the weights alone, no text",
    )
