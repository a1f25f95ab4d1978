"""compare: every method at every budget under one harness, cell by cell, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.api.assess import opened
from shoal.api.cells import Cells
from shoal.api.harness import DENSE, Harness
from shoal.api.spread import spread
from shoal.api.study import Cell, Protocol, cells
from shoal.evaluation import Progress


@dataclass(frozen=True)
class Compared:
    """What `compare` found."""

    facts: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    """The dense model first, then the cells in the order in which they were asked for."""
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json and the page."""
        return {"facts": self.facts, "rows": list(self.rows), "folder": str(self.folder)}


def compare(
    source: Any,
    folder: str | Path,
    *,
    methods: Sequence[str] = (),
    budgets: Sequence[str] = ("params=0.9,0.8,0.7",),
    seeds: Sequence[int] = (0,),
    protocol: Protocol | None = None,
    ray: str | None = None,
    workers: int = 2,
    progress: Progress | None = None,
    **options: Any,
) -> Compared:
    """Run every cell that `folder` does not hold yet, keep each when it is done, and answer all of them.

    See `cells` for methods and budgets, `Protocol` for data, `options` go to `shoal.load`. A method that fails is a row
    with an error. `ray`: the address of a Ray cluster, or `local`; cells are its tasks then, each of `workers` holds
    the model. Raises before anything runs `UsageError`, `DataError` and `ModelError`.
    """
    protocol, place = protocol or Protocol(), Path(folder).expanduser()
    asked = cells(methods, budgets, seeds)
    loaded = opened(source, **options)
    harness = Harness.of(loaded, protocol, place)
    for budget in dict.fromkeys(cell.budget for cell in asked):
        harness.budget(budget)
    facts = harness.facts()
    store = Cells(place, facts)
    wanted: list[Cell | None] = [None, *asked]
    keys = [DENSE if cell is None else cell.key for cell in wanted]
    left = [cell for cell, key in zip(wanted, keys, strict=True) if key not in store.done]
    done = len(wanted) - len(left)
    if progress is not None:
        progress(done, len(wanted), "cells")
    for row in spread(harness, left, ray=ray, workers=workers):
        store.add(row)
        done += 1
        if progress is not None:
            progress(done, len(wanted), "cells")
    return Compared(facts, tuple(store.done[key] for key in keys), place)
