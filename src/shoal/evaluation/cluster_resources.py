"""What a Ray cluster is asked for, and what it cannot give: said before anything waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal.errors import UsageError
from shoal.models.calls import device_of
from shoal.models.load import Loaded
from shoal.models.placed import is_placed, placed_devices


@dataclass(frozen=True)
class Cluster:
    """Where processes help, how many, and what each is given; none without an address."""

    address: str | None = None
    """Of a Ray cluster, or `local`: this machine."""
    workers: int = 2
    gpus: float = 0.0
    """For each of them; a share of one below 1."""


def require_reachable(cluster: Cluster, loaded: Loaded) -> None:
    """Before anything is computed: raise U572 for a spread model that was given as an object, U763 for one on a GPU
    where the processes are given none, U764 for a share of GPUs that Ray does not give."""
    if cluster.address is None:
        return
    if is_placed(loaded.model) and loaded.origin is None:
        raise UsageError(
            "--ray reads a model that --stream or --device-map keeps out of memory again in each worker, and this one "
            "was given as an object; give its folder",
            code="U572",
        )
    if cluster.gpus < 0 or (cluster.gpus > 1 and cluster.gpus != int(cluster.gpus)):
        raise UsageError(
            f"--gpus-per-worker {cluster.gpus:g} is nothing that Ray can give: write a share of one GPU, such as 0.5, "
            "or a whole number",
            code="U764",
        )
    places = placed_devices(loaded.model) or (str(device_of(loaded.model)),)
    on_gpu = [place for place in places if place.isdecimal() or place.startswith("cuda")]
    if on_gpu and not cluster.gpus:
        raise UsageError(
            f"the model is on {_cuda(on_gpu[0])} and the Ray workers are given no GPU; add --gpus-per-worker 1 (0.5: "
            "two on one), or --device cpu",
            code="U763",
        )


def require_resources(library: Any, cluster: Cluster) -> None:
    """Raise U765 where the machines of the cluster, were they free, could not hold all processes at once: Ray would
    wait for ever."""
    room = [(own, _fits(own, cluster.gpus)) for own in (node["Resources"] for node in library.nodes() if node["Alive"])]
    if sum(number for _, number in room) >= cluster.workers:
        return
    whole = library.cluster_resources()
    asked = f"{cluster.workers} workers with 1 CPU" + (f" and {cluster.gpus:g} GPUs" if cluster.gpus else "") + " each"
    smaller = " or a smaller --gpus-per-worker" if cluster.gpus else ""
    raise UsageError(
        f"the Ray cluster at {cluster.address} has {whole.get('CPU', 0):g} CPUs and {whole.get('GPU', 0):g} GPUs on "
        f"{len(room)} machines, and there is no place for {asked}; ask for fewer --workers{smaller}",
        code="U765",
    )


def _fits(own: dict[str, float], gpus: float) -> int:
    """How many processes a machine with these resources holds; a share is of one GPU."""
    by_cpu = int(own.get("CPU", 0))
    if not gpus:
        return by_cpu
    here = own.get("GPU", 0)
    return min(by_cpu, int(here) * int(1 / gpus + 1e-9) if gpus <= 1 else int(here / gpus))


def _cuda(place: str) -> str:
    return f"cuda:{place}" if place.isdecimal() else place
