"""Processes of a Ray cluster that hold a model and work for this one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from shoal.errors import UsageError, first_line, note
from shoal.evaluation.cluster_model import ModelSource, as_array, as_tensor, copied, readable
from shoal.evaluation.cluster_resources import Cluster, require_reachable, require_resources
from shoal.models.calls import device_of
from shoal.models.load import Loaded
from shoal.models.own_code import importable
from shoal.models.placed import is_placed
from shoal.user_files import adopt, known_files

RETRIES = 3
"""Times that work is given out again after the process that did it has died."""


class Machines:
    """`count` processes, each with an object that does the work; made by `machines`."""

    def __init__(
        self, library: Any, make: Callable[[Any, Any], Any], source: ModelSource, rest: Any, how: _How
    ) -> None:
        self.count = how.count
        self._library = library
        needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": how.gpus}
        kind = library.remote(**needs, max_restarts=RETRIES, max_task_retries=RETRIES)(_Process)
        # References in a list: a bare one would be fetched for every process anew, and a large value be lost with the
        # process. Held here, because one that takes a dead one's place needs them again
        self._shared = [library.put((make, source, known_files())), library.put(rest)]
        self._processes = [kind.remote(self._shared, how.threads) for _ in range(how.count)]

    def about(self) -> list[dict[str, Any]]:
        """Of each process, once it has its model or will get none: `pid`, `device`, and `refused`, why it has none."""
        with self._in_words():
            found: list[dict[str, Any]] = self._library.get([one.about.remote() for one in self._processes])
        return found

    def refused(self) -> str | None:
        """Why a process has no model, if one has none."""
        return next((one["refused"] for one in self.about() if one["refused"] is not None), None)

    def stop(self) -> None:
        """End the processes; others may be started."""
        for one in self._processes:
            self._library.kill(one)

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
        while True:
            with self._in_words():
                for place in free:
                    if (job := choose(place)) is not None:
                        busy[self._processes[place].do.remote(*job)] = place
                if not busy:
                    return
                ready, _ = self._library.wait(list(busy), num_returns=1)
                free = [busy.pop(ready[0])]
                found = self._library.get(ready[0])
            yield found

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        """Errors of a job are raised as what they are, those of the cluster as U571."""
        try:
            yield
        except self._library.exceptions.RayTaskError as error:
            raise error.as_instanceof_cause() from error
        except self._library.exceptions.RayError as error:
            message = f"a Ray worker failed: {str(error).strip().splitlines()[-1][:300]}"
            raise UsageError(message, code="U571") from error


@contextmanager
def machines(
    cluster: Cluster, make: Callable[[Any, Any], Any], loaded: Loaded, rest: Any = None
) -> Iterator[Machines | None]:
    """Processes of the cluster, in each of which `make(loaded, rest).do(...)` works; None without an address.

    `loaded` is the model there, `rest` what else the work needs, pickled. Each process reads the model from where it
    was read here, and gets a copy of this one through Ray where it cannot, where it reads another one, or where the
    model exists in memory only; the tensors of a copy lie in each machine's shared memory once. Raises U571 when Ray is
    not installed, cannot be reached, or a process dies too often; U572 for a model that lies in files or is spread and
    that they cannot read; U763 to U765 for GPUs and processes that are not there.
    """
    if cluster.address is None:
        yield None
        return
    require_reachable(cluster, loaded)
    library = _connected(cluster.address, cluster.workers)
    try:
        require_resources(library, cluster)
        yield _started(library, make, loaded, rest, cluster)
    finally:
        library.shutdown()


@dataclass(frozen=True)
class _How:
    """The part of a `Cluster` that a process is started with, and the threads of torch in it."""

    count: int
    gpus: float
    threads: int


def _started(library: Any, make: Callable[[Any, Any], Any], loaded: Loaded, rest: Any, cluster: Cluster) -> Machines:
    """The processes, once each has its model."""
    how = _How(cluster.workers, cluster.gpus, _threads_each(cluster))
    device = "cuda:0" if cluster.gpus else str(device_of(loaded.model))
    if (source := readable(loaded, device)) is not None:
        found = Machines(library, make, source, rest, how)
        if (why := found.refused()) is None:
            return found
        found.stop()
        said = f"a Ray worker cannot read {loaded.source} as it was read here ({why})"
        if is_placed(loaded.model):
            raise UsageError(
                f"{said}, and a model that is not whole in memory is not copied; put it where all machines of the "
                "cluster see it, or leave --stream and --device-map out",
                code="U572",
            )
        note(f"{said}; it is copied to the workers")
    found = Machines(library, make, copied(library, loaded, device), rest, how)
    if why := found.refused():
        raise UsageError(f"a Ray worker cannot take the model: {why}", code="U571")
    return found


class _Process:
    """What lives in a process of the cluster."""

    def __init__(self, shared: list[Any], threads: int) -> None:
        library = import_module("ray")
        make, source, files = library.get(shared[0])
        torch.set_num_threads(threads)
        adopt(files)
        importable()
        self._about: dict[str, Any] = {"pid": os.getpid(), "refused": None}
        try:
            loaded = source.loaded()
        except Exception as error:  # told by `about`: what a constructor raises is lost among Ray's own words
            self._about["refused"] = first_line(error)
            return
        self._about["device"] = str(device_of(loaded.model))
        self._own = make(loaded, library.get(shared[1]))

    def about(self) -> dict[str, Any]:
        return self._about

    def do(self, *args: Any) -> Any:
        if (why := self._about["refused"]) is not None:  # one that took a dead one's place, and finds another model
            raise UsageError(f"a Ray worker that was started again has no model: {why}", code="U571")
        return self._own.do(*args)


def _threads_each(cluster: Cluster) -> int:
    """Threads of torch for each process."""
    whole = torch.get_num_threads()
    return max(1, whole // cluster.workers) if cluster.address == "local" else whole


def _connected(address: str, count: int) -> Any:
    """The library, at work at `address`, and able to hand tensors on. Raises U571."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its core warns of the arguments that `Machines` holds
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
    library.util.register_serializer(torch.Tensor, serializer=as_array, deserializer=as_tensor)
    return library
