"""Independent pieces of work, one after the other here or side by side as tasks of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import torch

from shoal.evaluation.cluster import RETRIES, connected, lost, threads_each


class Worker(Protocol):
    """What does a piece of work; it is copied once to each process that helps."""

    def row(self, item: Any) -> dict[str, Any]:
        """The result of one piece."""

    def learn(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take note of what others found, so that it need not be found again."""


class Order(Protocol):
    """How long a piece will take, as far as is known from those that are done."""

    def __call__(self, item: Any, /) -> Any:
        """Larger for what takes longer."""

    def learn(self, row: Mapping[str, Any], /) -> None:
        """Take note of a result."""


def spread(
    worker: Worker, items: Sequence[Any], *, ray: str | None, workers: int, expected: Order
) -> Iterator[dict[str, Any]]:
    """The results as they are done: in the order of `items` without Ray, with it the `expected` longest first.

    Raises U571 when Ray is asked for and not installed, or cannot be reached.
    """
    if ray is None:
        for item in items:
            yield worker.row(item)
        return
    yield from _with_ray(worker, items, ray, workers, expected)


def _with_ray(
    worker: Worker, items: Sequence[Any], address: str, workers: int, expected: Order
) -> Iterator[dict[str, Any]]:
    library, threads = connected(address, workers), threads_each(address, workers)
    try:
        # put once: the weights lie in the machine's shared memory, and every worker maps them instead of copying them
        shared = library.put(worker)
        task = library.remote(num_cpus=1, max_retries=RETRIES)(_task)
        waiting, busy, known = list(items), list[Any](), list[dict[str, Any]]()
        while waiting or busy:
            while waiting and len(busy) < workers:
                waiting.sort(key=expected, reverse=True)
                busy.append(task.remote([shared], threads, waiting.pop(0), known))
            ready, busy = library.wait(busy, num_returns=1)
            row = library.get(ready[0])
            expected.learn(row)
            known.append({name: part for name, part in row.items() if name != "weights"})
            yield row
    except library.exceptions.RayError as error:
        raise lost(error) from error
    finally:
        library.shutdown()


_held: dict[str, Worker] = {}
"""The worker that this process of the cluster holds: it is mapped for the first task and stays for the next ones."""


def _task(shared: list[Any], threads: int, item: Any, known: list[dict[str, Any]]) -> dict[str, Any]:
    """`shared` is a list, because Ray would fetch a bare reference for every task anew."""
    name = shared[0].hex()
    if name not in _held:
        torch.set_num_threads(threads)
        _held[name] = import_module("ray").get(shared[0])
    _held[name].learn(known)
    return _held[name].row(item)
