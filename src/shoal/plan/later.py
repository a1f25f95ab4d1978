"""Later sources: what a run takes from a layer that runs after it, and so only of the tokens before."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.plan.sources import AttentionMap, LayerKV, LayerSource
from shoal.plan.steps import Run, Step, map_source, runs, sources_read
from shoal.plan.tensors import Finding


def later_sources(steps: tuple[Step, ...]) -> Iterator[tuple[int, Run, LayerSource]]:
    """The runs that take something from a layer which makes it in a later step and in none before, with the position of
    their step and that source."""
    first: dict[LayerSource, int] = {}
    wanted: dict[int, list[LayerSource]] = {}
    for source in sources_read(steps):
        wanted.setdefault(source.layer, []).append(source)
    for position, step in enumerate(steps):
        for run in runs((step,)):
            for source in wanted.get(run.layer, ()):
                if _makes(run, source):
                    first.setdefault(source, position)
    for position, step in enumerate(steps):
        for run in runs((step,)):
            yield from ((position, run, one) for one in run.layer_sources if first.get(one, -1) > position)


def _makes(run: Run, source: LayerSource) -> bool:
    """Whether a run of the layer makes what is taken from it; of a map, whether its attention runs."""
    return run.part != "mlp" and (isinstance(source, AttentionMap) or source.gives <= run.stores)


def reads_later(steps: tuple[Step, ...]) -> bool:
    """Whether some run takes something from a layer that runs later."""
    return next(later_sources(steps), None) is not None


def unfit_later(steps: tuple[Step, ...]) -> Iterator[Finding]:
    """What cannot be taken from a later run: anything but keys and values together. And a map that leaves out the token
    itself, as that of a run with a later source does, fits no other run's values."""
    shifted: set[int] = set()
    for _, run, source in later_sources(steps):
        here = f"layer {run.layer} {source}, which runs later"
        if not isinstance(source, LayerKV):
            why = "from a later run keys and values come together"
            yield "P164", run.layer, f"{here}, and {why}; write {run.layer}@{source.layer}, or name an earlier layer"
        elif map_source(run) is not None:
            why = "a map of another layer does not leave out the token itself"
            yield "P164", run.layer, f"{here}, and {why}; write {run.layer}@{source.layer} alone"
        shifted.add(run.layer)
    for run in runs(steps):
        if (followed := map_source(run)) is not None and followed in shifted:
            here = f"layer {run.layer} takes over the attention map of layer {followed}, which reads a layer that runs"
            yield "P164", run.layer, f"{here} later, so its map leaves out the token itself; name another layer"
