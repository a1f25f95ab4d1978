"""shoal compare: every method at every budget under one harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._shared import config_text, emit, is_typed, loading, progress_bars, unused


def compare(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the results; one that is half done is gone on with.")
    ],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="NAME or NAME:option=value,option=value; once for each. Default: all."),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", help="UNIT=SHARE,SHARE such as params=0.9,0.8 (layers, params, flops, kv)."),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Once for each repetition; 0 takes the first windows, others a random choice."),
    ] = None,
    data: options.DataSource = "builtin",
    text_key: options.TextKey = None,
    chat_template: options.ChatTemplate = None,
    test_data: Annotated[
        list[str] | None, typer.Option("--test-data", help="Text for perplexity; once for each. Default: builtin.")
    ] = None,
    tasks: options.Tasks = None,
    length: options.Length = 512,
    limit: options.Limit = 16,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens in a test window.")] = 512,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Test windows of each text.")] = 16,
    task_items: options.TaskItems = 200,
    new_tokens: Annotated[int, typer.Option("--new", min=0, help="Tokens of the generation check; 0: none.")] = 64,
    pairs: Annotated[int, typer.Option("--pairs", min=0, help="Rounds of the paired timing; 0: none.")] = 3,
    batch: options.Batch = 1,
    heal: Annotated[
        str | None, typer.Option("--heal", help="Heal each plan by this recipe before it is judged; needs --tokens.")
    ] = None,
    tokens: options.Tokens = None,
    writable: Annotated[bool, typer.Option("--writable", help="Only plans that a plain checkpoint can hold.")] = False,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Address of a Ray cluster, or local: cells run there.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Cells at a time, with --ray.")] = 2,
    gpus_per_worker: options.GpusPerWorker = 0.0,
    track: options.Track = None,
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
    """Compare methods at equal budgets: quality, cost and measured speed, as a table and a page with the frontier."""
    from shoal.api.study import Protocol, cells, full_paths
    from shoal.data.spelled import keyed, located

    methods, budgets, seeds = method or [], budget or ["params=0.9,0.8,0.7"], seed or [0]
    asked = cells(methods, budgets, seeds)
    if not tasks:
        unused("no --tasks are given", "task_items")
    if heal is None:
        unused("nothing is healed without --heal", "tokens")
    if stream:  # each token that is written, and each that is timed, would read all layers again
        new_tokens, pairs = (new_tokens if is_typed("new_tokens") else 0), (pairs if is_typed("pairs") else 0)
    if ray is None:
        unused("no --ray is given", "workers", "gpus_per_worker")
    if dry_run:
        text = "\n".join([f"would run the dense model and {len(asked)} cells:", *(cell.key for cell in asked)])
        emit({"would": [cell.key for cell in asked], "config": config_text()}, text, as_json=json_)
        return
    keyed(data, text_key, chat_template)
    protocol = Protocol(
        data=located(data, text_key),
        tests=tuple(located(text) for text in test_data or ["builtin"]),
        chat_template=chat_template if chat_template in (None, "plain") else full_paths([chat_template])[0],
        tasks=full_paths(tasks or []),
        length=length,
        limit=limit,
        window=window,
        windows=windows,
        task_items=task_items,
        new_tokens=new_tokens,
        pairs=pairs,
        batch=batch,
        writable=writable,
        heal=heal,
        heal_tokens=None if heal is None else _tokens(heal, tokens),
    )
    from shoal.api.compare import compare as run
    from shoal.api.compare import publish

    with progress_bars(quiet) as progress:
        try:
            found = run(
                model,
                output,
                methods=methods,
                budgets=budgets,
                seeds=seeds,
                protocol=protocol,
                ray=ray,
                workers=workers,
                gpus_per_worker=gpus_per_worker,
                track=track or [],
                progress=progress,
                **loading(device, dtype, trust_remote_code, stream, device_map=device_map),
            )
        except KeyboardInterrupt:
            typer.echo(f"finished cells are in {output}; the same command goes on from there", err=True)
            raise
    page = publish(found)
    emit(found.to_dict(), _text(found, page), as_json=json_)


def _tokens(recipe: str, tokens: str | None) -> int:
    """How many each plan is healed on. Raises U501 and U502 for the recipe, U673 for an amount."""
    from shoal.api.heal import amount_of, recipe_of
    from shoal.cli.heal import tokens_of

    recipe_of(recipe, None, [], [])
    return int(amount_of(None if tokens is None else tokens_of(tokens), None)["tokens"])


def _text(found: Any, page: Path) -> str:
    from shoal.cli._shared import table

    head, rows = found.table()
    return "\n".join([table(rows, head), "", *found.advice(), "", f"the page: {page}"])
