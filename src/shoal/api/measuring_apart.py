"""Measures as tasks of a Ray cluster: one for each measure and text, or for each share of the text's sequences where a
measure looks at one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from shoal.data import Data
from shoal.evaluation import Progress
from shoal.evaluation.cluster import machines
from shoal.evaluation.cluster_resources import Cluster
from shoal.evaluation.mean_scores import mean_scores
from shoal.models.load import Loaded
from shoal.registry import Entry
from shoal.scores import Scores, Traits

Task = tuple[str, dict[str, Any], Data | None]
"""A measure, its options, and the windows that it looks at."""


@dataclass(frozen=True)
class MeasureWorker:
    """What works in each process: `shoal.measure` on one model."""

    loaded: Loaded
    function: Callable[..., Scores]

    def do(self, number: int, task: Task, options: Mapping[str, Any]) -> tuple[int, Scores]:
        """The number of the task with its scores."""
        name, own, data = task
        return number, self.function(self.loaded, name, data=data, settings=own, **options)


def measured_apart(
    function: Callable[..., Scores],
    loaded: Loaded,
    wanted: Sequence[tuple[Entry, dict[str, Any], Data | None]],
    cluster: Cluster,
    *,
    batch: int,
    progress: Progress | None,
    **options: Any,
) -> list[Scores]:
    """The scores of each measure with its options on its windows, as `function` (`shoal.measure`) gives them here. A
    measure whose `Traits` say `alone` is asked for each share of the windows, cut where batches end. Raises what
    `machines` does."""
    tasks, places = list[Task](), list[int]()
    for place, (entry, own, data) in enumerate(wanted):
        for part in _shares(entry, data, cluster.workers, batch):
            tasks.append((entry.name, own, part))
            places.append(place)
    found: dict[int, Scores] = {}
    with machines(cluster, MeasureWorker, loaded, function) as pool:
        assert pool is not None
        jobs = [(number, task, {"batch": batch, **options}) for number, task in enumerate(tasks)]
        for number, scores in pool.anywhere(jobs):
            found[number] = scores
            if progress is not None:
                progress(len(found), len(tasks), "measures")
    parts = [[found[number] for number, own in enumerate(places) if own == place] for place in range(len(wanted))]
    return [_merged(own, data) for own, (_, _, data) in zip(parts, wanted, strict=True)]


def _shares(entry: Entry, data: Data | None, count: int, batch: int) -> list[Data | None]:
    traits: Traits = getattr(import_module(entry.module), "TRAITS", Traits())
    if data is None or not traits.alone:
        return [data]
    batches = -(-len(data) // batch)
    size = -(-batches // count) * batch
    return [data.only(range(at, min(at + size, len(data)))) for at in range(0, len(data), size)]


def _merged(parts: Sequence[Scores], data: Data | None) -> Scores:
    """The scores on all windows, of those on shares of them."""
    first, *rest = parts
    if not rest:
        return first
    assert data is not None
    sums = [[value for part in parts for value in part.samples[layer]] for layer in range(len(first.values))]
    counts = [count for part in parts for count in part.counts]
    whole = mean_scores(
        first.measure, first.unit, sums, counts, data, stack=first.stack, span=first.span, notes=first.notes,
        detail=first.detail, removal=first.removal,
    )  # fmt: skip
    return replace(whole, tokens=sum(part.tokens for part in parts))
