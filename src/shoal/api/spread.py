"""Independent pieces of work, one after the other here or side by side in processes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from shoal.evaluation.cluster import machines


class Worker(Protocol):
    """What does a piece of work; it is copied once to each process that helps."""

    def row(self, item: Any) -> dict[str, Any]:
        """The result of one piece."""

    def learn(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take note of what others found, so that it need not be found again."""


class Order(Protocol):
    """How long a piece will take, as far as is known from those that are done, and which have work in common."""

    def __call__(self, item: Any, /) -> Any:
        """Larger for what takes longer."""

    def learn(self, row: Mapping[str, Any], /) -> None:
        """Take note of a result."""

    def group(self, item: Any, /) -> Any:
        """The same for pieces that have work in common."""


def spread(
    worker: Worker, items: Sequence[Any], *, ray: str | None, workers: int, expected: Order
) -> Iterator[dict[str, Any]]:
    """The results as they are done: in the order of `items` without Ray, with it the `expected` longest first,
    those of a group in one process as long as there are others to do.

    Raises U571 when Ray is asked for and not installed, or cannot be reached.
    """
    if ray is None:
        for item in items:
            yield worker.row(item)
        return
    waiting, known = list(items), list[dict[str, Any]]()
    groups: dict[int, set[Any]] = {place: set() for place in range(workers)}

    def choose(place: int) -> tuple[Any, list[dict[str, Any]]] | None:
        if not waiting:
            return None
        others = set().union(*(own for other, own in groups.items() if other != place))
        waiting.sort(key=expected, reverse=True)
        # a process knows what it has found for the group, and two at one group would find the same twice
        ranks = [
            0 if expected.group(one) in groups[place] else 2 if expected.group(one) in others else 1 for one in waiting
        ]
        item = waiting.pop(ranks.index(min(ranks)))
        groups[place].add(expected.group(item))
        return item, list(known)

    with machines(ray, workers, Hand, worker) as crew:
        assert crew is not None
        for row in crew.fed(choose):
            expected.learn(row)
            known.append({name: part for name, part in row.items() if name != "weights"})
            yield row


class Hand:
    """What works in each process of the cluster."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def do(self, item: Any, known: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The result of one piece; `known` are those of others."""
        self.worker.learn(known)
        return self.worker.row(item)
