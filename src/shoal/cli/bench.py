"""shoal bench: wall clock of prefill and decode, dense and pruned in turn."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shoal.cli._shared import (
    Batch,
    Config,
    Device,
    DryRun,
    Dtype,
    Json,
    Model,
    PlanText,
    Quiet,
    Seed,
    Trust,
    config_text,
    emit,
    loading,
    open_model,
    progress_bars,
    table,
)  # fmt: skip


def bench(
    model: Model,
    plan: PlanText = None,
    against: Annotated[
        str | None, typer.Option("--against", help="The dense model, when MODEL is a pruned one.")
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of the prompt.")] = 512,
    new: Annotated[int, typer.Option("--new", min=1, help="Tokens to decode.")] = 32,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Rounds; in each both sides run once.")] = 5,
    batch: Batch = 1,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    config: Config = None,
) -> None:
    """Time prefill and decode apart, paired in one run, with the memory that weights and KV hold."""
    if dry_run:
        emit({"config": config_text()}, config_text(), as_json=json_)
        return
    from shoal.api.assess import bench as run

    options = loading(device, dtype, trust_remote_code)
    with progress_bars(quiet) as progress:
        loaded, chosen, weights = open_model(model, plan, **options)
        found = run(
            loaded,
            plan=chosen,
            weights=weights,
            against=against,
            prompt=prompt,
            new=new,
            batch=batch,
            pairs=pairs,
            seed=seed,
            progress=progress,
            **(options if against is not None else {}),
        )
    emit(found.to_dict(), _text(found), as_json=json_)


def _text(found: Any) -> str:
    s = found.speed
    rows = []
    for v in s.variants:
        held = found.memory[v.name]
        rows.append(
            [
                v.name,
                1000 * v.prefill.median,
                1000 * v.decode.median,
                v.prefill_ratio.median,
                v.decode_ratio.median,
                held.weight_bytes / 2**20,
                held.kv_bytes / 2**20,
            ]
        )
    work = f"batch {s.batch}, prompt {s.prompt}, {s.new} decoded, {s.pairs} rounds"
    head = f"{s.device}, {s.dtype}, {s.threads} threads, {work}\n"
    return head + table(
        rows, ["", "prefill ms", "ms/token", "prefill / dense", "decode / dense", "weights MiB", "KV MiB"]
    )
