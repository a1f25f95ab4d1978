"""shoal measure: which layers matter, by one measure or by several side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._shared import emit, emit_config, loading, progress_bars, table, unused
from shoal.errors import UsageError

_MEASURE, _DATA = ["block-influence"], ["builtin"]


def measure(
    model: options.Model,
    measure: Annotated[
        list[str], typer.Option("--measure", "-m", help="Which one; again for several side by side.")
    ] = _MEASURE,
    data: Annotated[
        list[str],
        typer.Option("--data", help=f"{options.DATA_HELP[:-1]}; again for several."),
    ] = _DATA,
    text_key: options.TextKey = None,
    chat_template: options.ChatTemplate = None,
    length: options.Length = 512,
    limit: options.Limit = 16,
    stride: options.Stride = None,
    bos: options.Bos = False,
    batch: options.Batch = 1,
    seed: options.Seed = 0,
    settings: options.Settings = None,
    stack: options.StackName = None,
    lowest: Annotated[int, typer.Option("--lowest", min=1, help="How many of the lowest layers are compared.")] = 8,
    enough: Annotated[bool, typer.Option("--enough", help="Also say how many sequences are enough.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the scores with their errors into this .svg file.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Address of a Ray cluster, or local: measures run there.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes that do so, with --ray.")] = 2,
    gpus_per_worker: options.GpusPerWorker = 0.0,
    track: options.Track = None,
    stream: options.Stream = False,
    adapter: options.AdapterFolder = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Score every layer: the lowest is the one to remove first. Several measures or texts: how far they agree."""
    from shoal.api.measuring import measure_several, reads_text, settings_of
    from shoal.data.spelled import keyed
    from shoal.evaluation.cluster_resources import Cluster

    own = settings_of(measure, settings or [])
    if not any(map(reads_text, measure)):
        unused("no measure asked for reads text", "length", "limit", "stride", "bos", "batch", "seed")
    if len(measure) * len(data) == 1 and not enough:
        unused("one score is compared with nothing", "lowest")
    if ray is None:
        unused("no --ray is given", "workers", "gpus_per_worker")
    if plot is not None:
        _require_svg(plot)
    if dry_run:
        emit_config(as_json=json_)
        return
    texts = [keyed(text, text_key, chat_template) for text in data]
    with progress_bars(quiet) as progress:
        found = measure_several(
            model, measure, data=texts, settings=own, lowest=lowest, stability=enough,
            cluster=Cluster(ray, workers, gpus_per_worker), track=track or [], progress=progress,
            load=loading(device, dtype, trust_remote_code, stream, adapter, device_map), length=length, limit=limit,
            stride=stride, bos=bos, batch=batch, stack=stack, seed=seed or None,
        )  # fmt: skip
    if plot is not None:
        from shoal.atomic import write_atomically
        from shoal.report.plots import scores_file

        drawing = scores_file({name: own.to_dict() for name, own in found.scores.items()})
        write_atomically(plot, drawing)
    emit(found.to_dict(), _text(found), as_json=json_)


def _require_svg(plot: Path) -> None:
    """Before hours of work: a plot that could not be written."""
    if plot.suffix.lower() != ".svg" or not plot.parent.is_dir():
        refused = UsageError(f"{plot}: give a .svg file in a folder that exists", code="U650")
        raise typer.BadParameter(str(refused), param_hint="--plot")


def _text(found: Any) -> str:
    """One score in full; several side by side, with the agreement of their orders."""
    if len(found.scores) == 1:
        (only,) = found.scores.values()
        body = _one(only)
    else:
        body = _several(found)
    return body + "".join(_stability(name, own) for name, own in found.enough.items())


def _one(scores: Any) -> str:
    """Every layer with its score, its error and a bar, then the order."""
    judged = [scores.values[i] for i in scores.order()]
    top = max(judged, default=1.0) or 1.0
    ranks = {layer: rank for rank, layer in enumerate(scores.order())}
    rows = [
        [
            i,
            value,
            scores.errors[i],
            ranks.get(i),
            "█" * round(30 * max(value, 0) / top) if i in ranks else "not judged",
        ]
        for i, value in enumerate(scores.values)
    ]
    name = "layer" if scores.span == 1 else f"first of {scores.span}"
    head = f"{scores.measure} ({scores.unit}) on {scores.data}; {_reading(scores)}\n"
    order = ", ".join(map(str, scores.order()[:12]))
    notes = "".join(f"\nnote: {note}" for note in scores.notes)
    return head + table(rows, [name, "score", "+-", "rank", ""]) + f"\nlowest first: {order}{notes}"


def _reading(scores: Any) -> str:
    return "the lowest goes first" if scores.removal else "a diagnostic: the lowest is not what may be removed"


def _several(found: Any) -> str:
    """A column for each score, the orders, and a row for every two."""
    depth = max(len(own.values) for own in found.scores.values())
    rows = [
        [i, *(_value(own.values[i]) if i < len(own.values) else None for own in found.scores.values())]
        for i in range(depth)
    ]
    lines = [table(rows, ["layer", *found.scores]), ""]
    for name, own in found.scores.items():
        lines.append(f"{name} ({own.unit}) on {own.data}; {_reading(own)}")
        lines.append(f"  lowest first: {', '.join(map(str, own.order()[:12]))}")
        lines += [f"  note: {note}" for note in own.notes]
    pairs = [
        [a, b, _value(own.kendall), _value(own.spearman), f"{own.overlap} of {own.k}"]
        for (a, b), own in found.agreement.items()
    ]
    if pairs:
        lines += ["", table(pairs, ["", "", "Kendall", "Spearman", "lowest in common"])]
    return "\n".join(lines)


def _value(value: float) -> float | None:
    return None if math.isnan(value) else value


def _stability(name: str, found: Any) -> str:
    if isinstance(found, str):
        return f"\n\n{name}: {found}"
    rows = [[size, overlap] for size, overlap in zip(found.sizes, found.overlap, strict=True)]
    heading = (
        f"{found.sequences} sequences are enough for the {found.k} lowest of {name}"
        if found.sequences is not None
        else f"not even {found.sizes[-1]} sequences are enough for the {found.k} lowest of {name}"
    )
    why = f"two texts of so many sequences agree on this share of them, and {found.share:g} was asked for"
    return f"\n\n{heading}: {why}\n" + table(rows, ["sequences", "in common"])
