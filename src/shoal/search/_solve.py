"""Exact solutions of a table of choices: an integer programme, and dynamic programming along the chain of layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shoal.plan.price import TOLERANCE
from shoal.search._table import Table

if TYPE_CHECKING:
    import numpy as np

Pairs = Mapping[tuple[int, int, int], float]
"""(place of a layer in the table, its option, the option of the layer before it) -> what the pair costs beyond both."""


def solve(
    table: Table,
    need: float,
    *,
    around: Sequence[int] | None = None,
    reach: int | None = None,
    without: Sequence[Sequence[int]] = (),
) -> tuple[int, ...] | None:
    """The option numbers, one per layer, with the lowest sum of losses that save `need` or more, or None.

    `reach`: at most so many layers may differ from the option numbers `around`. `without`: solutions not wanted.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    places = [(i, c) for i, row in enumerate(table.losses) for c in range(len(row))]
    flat = np.array([table.losses[i][c] for i, c in places])
    rows, low, high = [], [], []
    for layer in range(len(table.layers)):
        rows.append([float(i == layer) for i, _ in places])
        low.append(1.0)
        high.append(1.0)
    rows.append([table.saved[i][c] for i, c in places])
    low.append(need - TOLERANCE)
    high.append(np.inf)
    for other in without:
        rows.append([float(other[i] == c) for i, c in places])
        low.append(-np.inf)
        high.append(len(table.layers) - 1.0)
    if around is not None and reach is not None:
        rows.append([float(around[i] == c) for i, c in places])
        low.append(len(table.layers) - reach)
        high.append(np.inf)
    possible = np.isfinite(flat)
    result = milp(
        np.where(possible, flat, 0.0),
        constraints=LinearConstraint(np.array(rows), np.array(low), np.array(high)),
        integrality=np.ones(len(places)),
        bounds=Bounds(np.zeros(len(places)), possible.astype(float)),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    picked = {i: c for (i, c), x in zip(places, result.x, strict=True) if x > 0.5}
    return tuple(picked[i] for i in range(len(table.layers)))


def chain(table: Table, pairs: Pairs, need: float, resolution: int = 1000) -> tuple[int, ...] | None:
    """The option numbers with the lowest sum of losses and pairs that save `need` or more, or None.

    O(layers x options^2 x resolution).
    """
    import numpy as np

    bins = math.ceil((need - TOLERANCE) * resolution)
    steps = [[math.floor((saving + TOLERANCE) * resolution) for saving in row] for row in table.saved]
    size = max(0, bins) + 1  # savings beyond what is needed count as just enough
    best: list[list[np.ndarray[Any, Any]]] = []
    came: list[list[np.ndarray[Any, Any]]] = []
    for place, losses in enumerate(table.losses):
        best.append([])
        came.append([])
        for option, loss in enumerate(losses):
            values = np.full(size, np.inf)
            sources = np.zeros(size, dtype=np.int64)
            before = best[place - 1] if place else [np.where(np.arange(size) == 0, 0.0, np.inf)]
            for other, known in enumerate(before):
                extra = pairs.get((place, option, other), 0.0)
                shifted, origin = _shift(known, steps[place][option])
                better = shifted + loss + extra < values
                values = np.where(better, shifted + loss + extra, values)
                sources = np.where(better, other * size + origin, sources)
            best[place].append(values)
            came[place].append(sources)
    at = max(0, bins)
    option = int(np.argmin([values[at] for values in best[-1]]))
    if not np.isfinite(best[-1][option][at]):
        return None
    chosen = [option]
    for place in range(len(table.losses) - 1, 0, -1):
        option, at = divmod(int(came[place][option][at]), size)
        chosen.append(option)
    return tuple(reversed(chosen))


def _shift(known: np.ndarray[Any, Any], by: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """For every saving after `by` more, the least value before it and where that was; the last bin means "enough"."""
    import numpy as np

    size = len(known)
    values, origin = np.full(size, np.inf), np.zeros(size, dtype=np.int64)
    for source in range(max(0, -by), size):
        target = min(source + by, size - 1)
        if known[source] < values[target]:
            values[target], origin[target] = known[source], source
    return values, origin
