"""shoal measure: which layers matter."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shoal.cli._shared import (
    Batch,
    Bos,
    Config,
    DataSource,
    Device,
    DryRun,
    Dtype,
    Json,
    Length,
    Limit,
    Model,
    Quiet,
    Seed,
    Settings,
    StackName,
    Stride,
    Trust,
    config_text,
    emit,
    loading,
    progress_bars,
    table,
)  # fmt: skip


def measure(
    model: Model,
    measure: Annotated[
        str, typer.Option("--measure", "-m", help="Which one; see shoal ls measures.")
    ] = "block-influence",
    data: DataSource = "builtin",
    length: Length = 512,
    limit: Limit = 16,
    stride: Stride = None,
    bos: Bos = False,
    batch: Batch = 1,
    seed: Seed = 0,
    settings: Settings = None,
    stack: StackName = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    config: Config = None,
) -> None:
    """Score every layer: the lowest is the one to remove first."""
    from shoal.registry import get

    entry = get("measures", measure)
    options = entry.parse(settings or [])
    if dry_run:
        emit({"config": config_text()}, config_text(), as_json=json_)
        return
    from shoal.api.find import measure as run

    with progress_bars(quiet) as progress:
        scores = run(
            model, measure, data=data, length=length, limit=limit, stride=stride, bos=bos, batch=batch,
            stack=stack, settings=options, progress=progress, **loading(device, dtype, trust_remote_code),
        )  # fmt: skip
    emit(scores.to_dict(), _text(scores), as_json=json_)


def _text(scores: Any) -> str:
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
    head = f"{scores.measure} ({scores.unit}) on {scores.data}; the lowest goes first\n"
    order = ", ".join(map(str, scores.order()[:12]))
    notes = "".join(f"\nnote: {note}" for note in scores.notes)
    return head + table(rows, [name, "score", "+-", "rank", ""]) + f"\nlowest first: {order}{notes}"
