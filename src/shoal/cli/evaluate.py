"""shoal evaluate: perplexity, agreement with the dense model, and what it writes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._shared import emit, emit_config, is_typed, loading, open_model, progress_bars, table, unused


def evaluate(
    model: options.Model,
    plan: options.PlanText = None,
    against: Annotated[str | None, typer.Option("--against", help="A dense model to compare with.")] = None,
    data: options.DataSource = "builtin",
    text_key: options.TextKey = None,
    chat_template: options.ChatTemplate = None,
    window: options.Window = 512,
    stride: options.Stride = None,
    limit: options.Limit = 16,
    bos: options.Bos = False,
    batch: options.Batch = 1,
    generation: Annotated[
        bool, typer.Option("--generation/--no-generation", help="Greedy generation check (default: if not --stream).")
    ] = True,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to generate for each prompt.")] = 64,
    tasks: options.Tasks = None,
    task_items: options.TaskItems = 200,
    cascade: Annotated[
        list[str] | None,
        typer.Option(
            "--cascade",
            help="Score --tasks alone, by a cascade: this plan answers what it is sure of, the rest goes to the next "
            "one, at last to --plan or the whole model; again for more, cheap ones first.",
        ),
    ] = None,
    tradeoff: Annotated[
        list[float] | None,
        typer.Option("--tradeoff", help="Weight of wrong answers beside cost, 0 to 1, by which --cascade chooses."),
    ] = None,
    kv_cache: options.KVCache = None,
    adapter: options.AdapterFolder = None,
    stream: options.Stream = False,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Perplexity and a greedy generation check; with --plan or --against also agreement with the dense model."""
    # each token that is written would read all layers again
    generation = generation and (not stream or is_typed("generation"))
    if not generation:
        unused("nothing is generated", "new_tokens")
    if kv_cache is not None:
        unused("with --kv-cache nothing is generated", "new_tokens")
    if not tasks:
        unused("no --tasks are given", "task_items")
    if cascade:
        unused(
            "--cascade scores tasks alone", "against", "data", "text_key", "chat_template", "window", "stride", "limit"
        )
        unused("--cascade scores tasks alone", "bos", "generation", "new_tokens", "kv_cache")
    else:
        unused("no --cascade is given", "tradeoff")
    if dry_run:
        emit_config(as_json=json_)
        return
    if cascade:
        from shoal.api.cascaded import TRADEOFFS
        from shoal.api.cascaded import cascade as run_cascade

        with progress_bars(quiet) as progress:
            loaded, chosen, weights = open_model(
                model, plan, **loading(device, dtype, trust_remote_code, stream, adapter, device_map)
            )
            tables = run_cascade(
                loaded,
                cascade,
                tasks or [],
                plan=chosen,
                weights=weights,
                tradeoffs=tradeoff or TRADEOFFS,
                task_items=task_items,
                batch=max(8, batch),
                progress=progress,
            )
        emit({"cascades": [one.to_dict() for one in tables]}, "\n\n".join(map(_cascade, tables)), as_json=json_)
        return
    from shoal.api.assess import evaluate as run
    from shoal.api.study import full_paths
    from shoal.data.spelled import keyed

    text = keyed(data, text_key, chat_template)
    with progress_bars(quiet) as progress:
        loaded, chosen, weights = open_model(
            model, plan, **loading(device, dtype, trust_remote_code, stream, adapter, device_map)
        )
        found = run(
            loaded,
            plan=chosen,
            weights=weights,
            against=against,
            data=text,
            window=window,
            stride=stride,
            limit=limit,
            bos=bos,
            batch=batch,
            generation=generation,
            new_tokens=new_tokens,
            tasks=full_paths(tasks or []),
            task_items=task_items,
            kv_cache=kv_cache,
            progress=progress,
            **(loading(device, dtype, trust_remote_code, stream, device_map=device_map) if against is not None else {}),
        )
    emit(found.to_dict(), _text(found), as_json=json_)


def _text(found: Any) -> str:
    rows: list[list[Any]] = []

    def row(name: str, get: Any, mine: Any, dense: Any) -> None:
        if mine is not None:
            rows.append([name, get(mine), None if dense is None else get(dense)])

    row("perplexity", lambda p: p.value, found.perplexity, found.dense)
    row("nats per token", lambda p: p.nll, found.perplexity, found.dense)
    row("  standard error", lambda p: p.error, found.perplexity, found.dense)
    row("KV values held", lambda kv: f"{kv.values:,} of {kv.whole:,}", found.kv, None)
    row("KL(dense || this), nats", lambda a: a.kl, found.agreement, None)
    row("top-1 agreement", lambda a: a.top1, found.agreement, None)
    row("repeated 4-grams", lambda g: g.repetition, found.generation, found.dense_generation)
    row("ended by itself", lambda g: g.ended, found.generation, found.dense_generation)
    for name, score in found.tasks.items():
        row(f"{name}, right of {score.items}", lambda s: s.accuracy, score, found.dense_tasks.get(name))
        row("  standard error", lambda s: s.error, score, found.dense_tasks.get(name))
    head = f"{found.perplexity.info.describe()}; {found.perplexity.tokens:,} tokens predicted\n"
    return head + table(rows, ["", "this model", "dense"])


def _cascade(found: Any) -> str:
    rows = [
        [f"{name} alone", one["accuracy"], one["error"], one["cost"], one["seconds"], ""]
        for name, one in zip(found.plans, found.alone, strict=True)
    ]
    for one in found.cascades:
        limits = " ".join("-" if t is None else f"{t:.3g}" for t in one["thresholds"])
        shares = " ".join(f"{share:.2f}" for share in one["answered"])
        rows.append(
            [f"tradeoff={one['tradeoff']:g}, sure from {limits}", *(one[k] for k in ("accuracy", "error", "cost")),
             one["seconds"], shares]
        )  # fmt: skip
    head = f"{found.task}: {found.items} items; {found.chosen_on} others chose how sure each plan must be\n"
    return head + table(rows, ["", "right", "+-", "FLOPs", "seconds", "answered by each"])
