"""shoal fuse: stand-ins for what a plan removes, merges of it into what stays, or layers added to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._places import require_plan_place
from shoal.cli._pruned import pruned_text
from shoal.cli._shared import (
    config_text,
    emit,
    emit_config,
    loading,
    need,
    open_model,
    progress_bars,
    tell_fits,
    unused,
)


def fuse(
    model: options.Model,
    plan: options.PlanText = None,
    then: Annotated[
        list[str] | None,
        typer.Option("--with", help="A transform, as refit or slerp:t=0.3 (shoal ls transforms); again for more."),
    ] = None,
    data: options.DataSource = "builtin",
    text_key: options.TextKey = None,
    chat_template: options.ChatTemplate = None,
    length: options.Length = 512,
    limit: options.Limit = 16,
    stride: options.Stride = None,
    bos: options.Bos = False,
    batch: options.Batch = 1,
    seed: options.Seed = 0,
    stack: options.StackName = None,
    save_plan: options.SavePlan = None,
    output: Annotated[Path | None, typer.Option("--output", help="Folder to write a plain checkpoint to.")] = None,
    as_: options.As = "stock",
    overwrite: options.Overwrite = False,
    assess: Annotated[
        bool | None,
        typer.Option("--assess/--no-assess", help="Evaluate and time dense against fused (default: causal models)."),
    ] = None,
    test_data: options.TestData = "builtin",
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
    """Fit or merge what --plan removes, or grow or share what runs; write the plan, a checkpoint or both."""
    need(then or None, "say what is done: --with refit, --with grow:every=4; see shoal ls transforms")
    from shoal.api.stand_ins import parse_then

    after = parse_then(then or [])
    if any(one.entry.needs_plan for one in after):
        need(plan, "say what is removed: --plan 0-11,14-29 or --plan plan.json")
    if not assess:
        unused("nothing is evaluated with --no-assess", "test_data")
    if output is None:
        unused("nothing is written without --output", "overwrite", "as_")
    if dry_run:
        emit_config(as_json=json_)
        return
    from shoal.api.prune import prune as run
    from shoal.data.spelled import keyed, templated
    from shoal.executing.weights import save_planned
    from shoal.models.kinds import is_causal
    from shoal.plan import Plan
    from shoal.writing.folder import refuse_output

    require_plan_place(save_plan)
    if output is not None:
        refuse_output(output, overwrite=overwrite)
    written: Any = None
    text, tests = keyed(data, text_key, chat_template), templated(test_data, chat_template)
    with progress_bars(quiet) as progress:
        loaded, chosen, weights = open_model(
            model, plan, **loading(device, dtype, trust_remote_code, stream, device_map=device_map)
        )
        # of what needs no plan comes what no stock class may hold
        stock = output is not None and as_ == "stock" and all(one.entry.needs_plan for one in after)
        chosen = chosen or Plan.identity(loaded.opened.spec, source=loaded.source)
        fused = run(
            loaded, plan=chosen, weights=weights, then=then or [], data=text, length=length, limit=limit,
            stride=stride, bos=bos, batch=batch, seed=seed, stack=stack, writable=stock,
            assess=is_causal(loaded.model) and not stream if assess is None else assess, test_data=tests,
            progress=progress,
        )  # fmt: skip
        tell_fits(fused.then, quiet)
        if save_plan is not None:
            save_planned(fused.plan, save_plan, fused.found.weights)
        if output is not None:
            written = _written(
                fused, output, overwrite=overwrite, config=config_text(), seed=seed, planned=as_ == "planned",
                progress=progress,
            )  # fmt: skip
    if isinstance(written, Path):
        kept = f"a plan with its tensors, for --plan {written} (a checkpoint by --as planned)"
        text = f"{pruned_text(fused, None)}\nwritten to {written}: {kept}"
        emit(fused.to_dict() | {"output": str(written)}, text, as_json=json_)
        return
    proved = {} if written is None else {"output": str(written.folder), "proof": written.proof.to_dict()}
    emit(fused.to_dict() | proved, pruned_text(fused, written), as_json=json_)


def _written(fused: Any, output: Path, *, overwrite: bool, seed: int, planned: bool, **how: Any) -> Any:
    """A proved checkpoint, stock or `planned`; where no stock class can hold the plan the folder of the plan with its
    tensors."""
    from shoal.api.heal_publish import publish_plan, why_no_checkpoint
    from shoal.api.publish import publish
    from shoal.record import Record, command_line

    plan, weights = fused.plan, fused.found.weights
    if planned or why_no_checkpoint(fused.loaded, plan, weights) is None:
        return publish(fused, output, overwrite=overwrite, seed=seed, planned=planned, **how)
    words = {"plan": plan.hash, "base": fused.spec.fingerprint, "seed": seed, "command": command_line()}
    return publish_plan(plan, weights, output, Record("fuse", fused.to_dict(), **words), overwrite=overwrite)
