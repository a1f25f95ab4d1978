"""Independent pieces of work, one after the other here or side by side in processes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from shoal.evaluation.cluster import machines
from shoal.evaluation.cluster_resources import Cluster
from shoal.models.load import Loaded


class Worker(Protocol):
    """What does a piece of work; it is copied once to each process that helps, where the model may be read anew."""

    @property
    def loaded(self) -> Loaded:
        """The model that it works on."""

    def on(self, loaded: Loaded | None) -> Worker:
        """The same on this model; None while it is copied."""

    def row(self, item: Any) -> dict[str, Any]:
        """The result of one piece."""

    def learn(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take note of what others found, so that it need not be found again."""


class WorkOrder(Protocol):
    """How long a piece will take, as far as is known from those that are done, and which pieces have work in common."""

    def __call__(self, item: Any, /) -> Any:
        """Larger for what takes longer."""

    def learn(self, row: Mapping[str, Any], /) -> None:
        """Take note of a result."""

    def group(self, item: Any, /) -> Any:
        """The same for pieces that have work in common, None for one that has none with any."""


def distribute(
    worker: Worker, items: Sequence[Any], *, cluster: Cluster, expected: WorkOrder
) -> Iterator[dict[str, Any]]:
    """The results as they are done: in the order of `items` without a cluster, with it the `expected` longest first,
    and those of a group in one process, one after the other.

    Raises what `machines` does.
    """
    if cluster.address is None:
        for item in items:
            yield worker.row(item)
        return
    waiting, known = list(items), list[dict[str, Any]]()
    taken: dict[Any, int] = {}

    def choose(place: int) -> tuple[Any, list[dict[str, Any]]] | None:
        waiting.sort(key=expected, reverse=True)
        mine = [one for one in waiting if (kind := expected.group(one)) is not None and taken.get(kind) == place]
        # what another process has begun stays there: it knows what it found, and here it would be found again
        free = [one for one in waiting if (kind := expected.group(one)) is None or kind not in taken]
        if not mine and not free:
            return None
        item = (mine or free)[0]
        waiting.remove(item)
        if (kind := expected.group(item)) is not None:
            taken[kind] = place
        return item, list(known)

    with machines(cluster, RemoteWorker, worker.loaded, worker.on(None)) as pool:
        assert pool is not None
        for row in pool.fed(choose):
            expected.learn(row)
            known.append({name: part for name, part in row.items() if name != "weights"})
            yield row


class RemoteWorker:
    """What works in each process of the cluster."""

    def __init__(self, loaded: Loaded, worker: Worker) -> None:
        self.worker = worker.on(loaded)

    def do(self, item: Any, known: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The result of one piece; `known` are those of others."""
        self.worker.learn(known)
        return self.worker.row(item)
