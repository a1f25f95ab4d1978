"""shoal prune: find the layers to remove, prove the result, write it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._places import require_plan_place
from shoal.cli._pruned import pruned_text
from shoal.cli._shared import (
    config_text,
    emit,
    loading,
    open_model,
    progress_bars,
    read_plan,
    read_weights,
    tell_fits,
    unused,
)
from shoal.errors import UsageError


def prune(
    model: options.Model,
    method: Annotated[str, typer.Option("--method", "-m", help="Which one; see shoal ls methods.")] = "shortgpt",
    drop: Annotated[int | None, typer.Option("--drop", help="How many layers to remove.")] = None,
    keep: Annotated[float | None, typer.Option("--keep", help="Or the share of layers to keep, such as 0.8.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Or what it may cost, as a share of dense: params=0.8; layers, flops, kv, prefill, decode.",
        ),
    ] = None,
    plan: options.PlanText = None,
    data: options.DataSource = "builtin",
    text_key: options.TextKey = None,
    chat_template: options.ChatTemplate = None,
    length: options.Length = 512,
    limit: options.Limit = 16,
    stride: options.Stride = None,
    bos: options.Bos = False,
    batch: options.Batch = 1,
    seed: options.Seed = 0,
    settings: options.Settings = None,
    then: options.Then = None,
    heal: Annotated[
        str | None, typer.Option("--heal", help="And train it then by a recipe, NAME or NAME:key=value (shoal heal).")
    ] = None,
    tokens: options.Tokens = None,
    minutes: options.Minutes = None,
    watch: options.Watch = "builtin",
    save_plan: options.SavePlan = None,
    stack: options.StackName = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write; without it only the plan is printed.")
    ] = None,
    overwrite: options.Overwrite = False,
    zero_parts: options.ZeroParts = False,
    assess: Annotated[
        bool | None,
        typer.Option(
            "--assess/--no-assess", help="Evaluate and time dense against pruned (default: causal models in memory)."
        ),
    ] = None,
    test_data: options.TestData = "builtin",
    journal: Annotated[
        Path | None, typer.Option("--journal", help="Keep evaluated plans here; a search cut off goes on.")
    ] = None,
    state_memory: Annotated[
        int | None, typer.Option("--state-memory", min=0, help="MB of hidden states held; beyond it they go to disk.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Address of a Ray cluster, or local: candidates are evaluated there.")
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
    """Remove layers by a published method, prove the result in a fresh process, and write it as a plain checkpoint."""
    from shoal.registry import get
    from shoal.spelling import read

    asked = read(method)
    entry = get("methods", asked.name)
    own = entry.parse([*asked.pairs, *(settings or [])])
    _tell_unused(entry, plan is not None, bool(then), assess is not False, output is not None, ray is not None)
    amount = _healing(heal, tokens, minutes)
    if dry_run:
        emit(*_dry(model, plan, entry, (drop, keep, budget), stack, trust_remote_code), as_json=json_)
        return
    from shoal.api.prune import prune as run
    from shoal.api.stand_ins import parse_then
    from shoal.data.spelled import keyed, templated
    from shoal.executing.weights import save_planned as keep_plan
    from shoal.models.kinds import is_causal
    from shoal.writing.folder import refuse_output

    parse_then(then or [])
    require_plan_place(save_plan)
    if output is not None:
        if adapter is not None:
            raise UsageError(
                "a plan is found with an adapter in the model and written without it; give --save-plan FOLDER in place "
                f"of --output, then: shoal write {model} --plan FOLDER --adapter {adapter} --output {output}",
                code="U671",
            )
        refuse_output(output, overwrite=overwrite)
    text, tests = keyed(data, text_key, chat_template), templated(test_data, chat_template)
    with progress_bars(quiet) as progress, _how_to_go_on(journal):
        loaded, chosen, weights = open_model(
            model, plan, **loading(device, dtype, trust_remote_code, stream, adapter, device_map=device_map)
        )
        asked_for = is_causal(loaded.model) and not stream if assess is None else assess
        pruned = run(
            loaded,
            method=method,
            plan=chosen,
            weights=weights,
            drop=drop,
            keep=keep,
            budget=budget,
            data=text,
            length=length,
            limit=limit,
            stride=stride,
            bos=bos,
            batch=batch,
            seed=seed,
            stack=stack,
            settings=own,
            then=then or [],
            writable=output is not None,
            zero_parts=zero_parts,
            journal=journal,
            memory=None if state_memory is None else state_memory << 20,
            ray=ray,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
            track=track or [],
            assess=heal is None and asked_for,
            test_data=tests,
            progress=progress,
        )
        if heal is not None:
            pruned = _healed(
                pruned, heal, output, quiet, **amount, data=text, watch=templated(watch, chat_template), seed=seed,
                track=track or [],
                assess=asked_for, stack=stack, progress=progress,
                test={"data": tests, "window": length, "limit": min(limit, 8), "bos": bos},
            )  # fmt: skip
        tell_fits(pruned.then, quiet)
        if save_plan is not None:
            keep_plan(pruned.plan, save_plan, pruned.found.weights)
        written = None
        if output is not None:
            from shoal.api.publish import publish
            from shoal.cli.heal import forget_checkpoints

            written = publish(
                pruned,
                output,
                overwrite=overwrite,
                zero_parts=zero_parts,
                config=config_text(),
                seed=seed,
                progress=progress,
            )
            forget_checkpoints(output)
    result = pruned.to_dict() | (
        {} if written is None else {"output": str(written.folder), "proof": written.proof.to_dict()}
    )
    emit(result, pruned_text(pruned, written), as_json=json_)


def _tell_unused(entry: Any, planned: bool, then: bool, assess: bool, written: bool, ray: bool) -> None:
    """What was typed and changes nothing in a run with these options."""
    if planned:
        unused("--plan says what runs", "method", "settings", "journal", "state_memory", *(() if then else ("stack",)))
    elif not entry.reads_data:
        unused(f"the method {entry.name} evaluates nothing", "journal", "state_memory")
    if not then and (planned or not entry.reads_data):
        unused("nothing here reads calibration text", "stride", *(() if assess else ("length", "limit", "bos")))
    if not assess:
        unused("nothing is evaluated with --no-assess", "test_data")
    if not written:
        unused("nothing is written without --output", "overwrite", "zero_parts")
    if not ray:
        unused("no --ray is given", "workers", "gpus_per_worker")


def _healing(recipe: str | None, tokens: str | None, minutes: float | None) -> dict[str, Any]:
    """How long to heal. Raises U501 and U502 for the recipe, U673 for an amount, U676 for one of several processes,
    before anything is loaded."""
    if recipe is None:
        unused("nothing is healed without --heal", "tokens", "minutes", "watch")
        return {}
    from shoal.api.heal import amount_of, recipe_of
    from shoal.cli.heal import tokens_of
    from shoal.healing.processes import require_one_process

    require_one_process("pruning with healing")
    recipe_of(recipe, None, [], [])
    return amount_of(None if tokens is None else tokens_of(tokens), minutes)


def _healed(pruned: Any, recipe: str, output: Path | None, quiet: bool, **how: Any) -> Any:
    """What was found, trained; a run that is stopped keeps its checkpoints, and the same command goes on."""
    from shoal.api.prune_and_heal import prune_and_heal
    from shoal.cli.heal import saying, stopping, tell_healed, tell_stopped
    from shoal.healing.run_folder import RunFolder
    from shoal.writing.output import final_path

    folder = None if output is None else RunFolder.beside(final_path(output))
    with stopping() as stop:
        pruned, healed = prune_and_heal(pruned, recipe, folder=folder, stop=stop, say=saying(quiet), **how)
        if healed.stopped:
            tell_stopped(folder, "the same command goes on from there")
    tell_healed(healed, quiet)
    return pruned


@contextmanager
def _how_to_go_on(journal: Path | None) -> Iterator[None]:
    """After Ctrl-C, say what was kept and how to go on from there."""
    try:
        yield
    except KeyboardInterrupt:
        if journal is None or not journal.exists():
            typer.echo("shoal: with --journal FILE a search that was stopped can go on where it was", err=True)
        else:
            plans = max(0, len(journal.read_bytes().splitlines()) - 1)
            kept = f"the journal {journal} keeps what was found of {plans} plans"
            typer.echo(f"shoal: {kept}; the same command goes on from there", err=True)
        raise


def _dry(
    model: str,
    plan: str | None,
    entry: Any,
    amount: tuple[int | None, float | None, str | None],
    stack: str | None,
    trust: bool,
) -> tuple[dict[str, Any], str]:
    from shoal.api.budget import amount_of, refuse_amount
    from shoal.models.load import inspect_source

    spec = inspect_source(model, trust_remote_code=trust)
    more = {}
    if plan is not None:
        from shoal.api.outlook import outlook
        from shoal.cli.doctor import plan_text

        chosen, weights = read_plan(plan, spec, model), read_weights(plan)
        seen = outlook(model, spec, chosen, weights=weights, trust_remote_code=trust).to_dict()
        what, more = plan_text(seen), {"outlook": seen}
    elif not entry.removes:
        refuse_amount(entry.name, *amount)
        what = f"would make {spec.family} deeper than {spec.stack(stack).depth} layers by {entry.name}"
    else:
        count, _ = amount_of(spec, stack, *amount)
        what = f"would remove {count} of {spec.stack(stack).depth} layers of {spec.family} ({spec.params:,} parameters)"
    return {"would": what, "config": config_text(), **more}, f"{what}\n\nthe same as a --config file:\n{config_text()}"
