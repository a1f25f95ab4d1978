"""Processes of a Ray cluster that hold a model and work for this one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from shoal.errors import UsageError, first_line
from shoal.models.own_code import importable
from shoal.user_files import UserFile, adopt, known_files

RETRIES = 3
"""Times that work is given out again after the process that did it has died."""


class Machines:
    """`count` processes, each with an object that does the work; made by `machines`."""

    def __init__(self, library: Any, make: Callable[[Any], Any], thing: Any, count: int, threads: int) -> None:
        self.count = count
        self._library = library
        kind = library.remote(num_cpus=1, max_restarts=RETRIES, max_task_retries=RETRIES)(_Process)
        shared = [library.put(thing)]  # in a list, because Ray would fetch a bare reference for every process anew
        self._processes = [kind.remote(make, shared, threads, known_files()) for _ in range(count)]

    def at(self, jobs: Sequence[tuple[int, Sequence[Any]]]) -> Iterator[Any]:
        """The results of jobs, (process, arguments of `do`), each done by that process; as they are done."""
        left = list(jobs)

        def own(place: int) -> Sequence[Any] | None:
            number = next((n for n, (wanted, _) in enumerate(left) if wanted == place), None)
            return None if number is None else left.pop(number)[1]

        return self.fed(own)

    def anywhere(self, jobs: Sequence[Sequence[Any]]) -> Iterator[Any]:
        """The results of jobs, arguments of `do`, each done by whichever process is free; as they are done."""
        left = list(jobs)
        return self.fed(lambda place: left.pop(0) if left else None)

    def fed(self, choose: Callable[[int], Sequence[Any] | None]) -> Iterator[Any]:
        """The results of jobs as they are done; `choose(process)` gives a free process its next one, None when there is
        nothing for it any more."""
        busy: dict[Any, int] = {}
        free = list(range(self.count))
        try:
            while True:
                for place in free:
                    if (job := choose(place)) is not None:
                        busy[self._processes[place].do.remote(*job)] = place
                if not busy:
                    return
                ready, _ = self._library.wait(list(busy), num_returns=1)
                free = [busy.pop(ready[0])]
                yield self._library.get(ready[0])
        except self._library.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from error
        except self._library.exceptions.RayError as error:
            message = f"a Ray worker failed: {str(error).strip().splitlines()[-1][:300]}"
            raise UsageError(message, code="U571") from error


@contextmanager
def machines(address: str | None, count: int, make: Callable[[Any], Any], thing: Any) -> Iterator[Machines | None]:
    """`count` processes at `address` (`local`: on this machine), in each of which `make(thing).do(...)` works; None
    without an address. Tensors in `thing` lie in each machine's shared memory once.

    Raises U571 when Ray is not installed, cannot be reached, or a process dies too often.
    """
    if address is None:
        yield None
        return
    library = _connected(address, count)
    try:
        yield Machines(library, make, thing, count, _threads_each(address, count))
    finally:
        library.shutdown()


class _Process:
    """What lives in a process of the cluster."""

    def __init__(self, make: Callable[[Any], Any], shared: list[Any], threads: int, files: Sequence[UserFile]) -> None:
        torch.set_num_threads(threads)
        adopt(files)
        importable()
        self._own = make(import_module("ray").get(shared[0]))

    def do(self, *args: Any) -> Any:
        return self._own.do(*args)


def _threads_each(address: str, count: int) -> int:
    """Threads of torch for each of `count` processes."""
    return max(1, torch.get_num_threads() // count) if address == "local" else torch.get_num_threads()


def _connected(address: str, count: int) -> Any:
    """The library, at work at `address`, and able to hand tensors on. Raises U571."""
    try:
        library = import_module("ray")
    except ImportError:
        raise UsageError("--ray needs the package ray; run: pip install 'shoal[ray]'", code="U571") from None
    where = {"num_cpus": count} if address == "local" else {"address": address}
    try:
        library.init(**where, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise UsageError(
            f"no Ray cluster answers at {address} ({first_line(error)}); start one, or use local",
            code="U571",
        ) from error
    library.util.register_serializer(torch.Tensor, serializer=_as_array, deserializer=_as_tensor)
    return library


_Packed = tuple[Any, torch.dtype, tuple[int, ...], str]


def _as_array(tensor: torch.Tensor) -> _Packed:
    """An array, which Ray hands on without copying; of bytes, because numpy lacks some of torch's types."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat, tensor.dtype, tuple(tensor.shape), str(tensor.device)


def _as_tensor(packed: _Packed) -> torch.Tensor:
    flat, dtype, shape, device = packed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may not be written to, and nobody does
        return torch.from_numpy(flat).view(dtype).reshape(shape).to(device)
