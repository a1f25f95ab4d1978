"""shoal write: a plan as a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import options
from shoal.cli._gguf import Wanted, write_gguf
from shoal.cli._shared import (
    config_text,
    emit,
    loading,
    need,
    open_model,
    progress_bars,
    read_plan,
    read_weights,
    unused,
)
from shoal.errors import UsageError

if TYPE_CHECKING:
    from shoal.writing.folder import Written
    from shoal.writing.stream import Streamed


def write(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", help="Folder to write, or a .gguf file.")],
    plan: options.PlanText = None,
    as_: options.As = "stock",
    overwrite: options.Overwrite = False,
    zero_parts: options.ZeroParts = False,
    shard_size: options.ShardSize = "5GB",
    stream: Annotated[
        bool, typer.Option("--stream", help="Copy file to file without loading: a local folder of any size.")
    ] = False,
    forward: Annotated[
        bool,
        typer.Option("--forward", help="With --stream or .gguf: load both models after all and compare them."),
    ] = False,
    outtype: Annotated[
        str | None, typer.Option("--outtype", help="Matrices of a .gguf: f32, f16, bf16, q8_0 (default: as stored).")
    ] = None,
    tokenizer_from: Annotated[
        Path | None, typer.Option("--tokenizer-from", help="A .gguf file whose tokenizer a .gguf output takes.")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter", help="A LoRA adapter of MODEL: written into OUTPUT/adapter with its layers renumbered."
        ),
    ] = None,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Write MODEL under --plan as a checkpoint that plain transformers loads, proved in a fresh process first; or as a
    .gguf file for llama.cpp."""
    _require_adapter_fits(adapter, stream, output)
    planned = _asks_planned(as_, output, {"--stream": stream, "--zero-parts": zero_parts, "--adapter": adapter})
    if output.suffix == ".gguf":
        unused("a .gguf is one file", "shard_size")
        wanted = Wanted(
            model, plan, output, outtype, tokenizer_from, zero_parts, overwrite, forward, stream, device, dtype,
            trust_remote_code,
        )  # fmt: skip
        write_gguf(wanted, json_=json_, quiet=quiet, dry_run=dry_run)
        return
    _refuse_gguf_options({"--outtype": outtype, "--tokenizer-from": tokenizer_from})
    need(plan, "say what to write: --plan 0-11,14-29 or --plan plan.json")
    _require_options_fit(stream, forward, {"--device": device, "--dtype": dtype})
    from shoal.models.load import inspect_source

    if dry_run:
        from shoal.api.outlook import outlook
        from shoal.cli.doctor import plan_text

        spec = inspect_source(model, trust_remote_code=trust_remote_code)
        chosen = read_plan(plan, spec, model)
        seen = outlook(model, spec, chosen, zero_parts=zero_parts, trust_remote_code=trust_remote_code)
        if seen.refused is not None:
            raise seen.refused
        text = f"would write this to {output}\n{plan_text(seen.to_dict())}\n\n{config_text()}"
        data = {"plan": str(chosen), "cost": seen.after.to_dict(), "outlook": seen.to_dict(), "config": config_text()}
        emit(data, text, as_json=json_)
        return
    if stream:
        with progress_bars(quiet) as progress:
            streamed = _stream(
                model, plan, output, overwrite=overwrite, zero_parts=zero_parts, shard_size=shard_size,
                forward=forward, trust_remote_code=trust_remote_code, progress=progress,
            )  # fmt: skip
        text = f"proved and written to {streamed.folder}: {streamed.params:,} parameters in {streamed.files} files"
        text += _dequantised(model)
        _emit({"output": str(streamed.folder), "proof": streamed.proof.to_dict()}, text, streamed, as_json=json_)
        return
    from shoal.api.prune import prune
    from shoal.api.publish import publish
    from shoal.writing.folder import refuse_output

    refuse_output(output, overwrite=overwrite)
    with progress_bars(quiet) as progress:
        loaded, chosen, weights = open_model(
            model, plan, **loading(device, dtype, trust_remote_code, device_map=device_map)
        )
        pruned = prune(loaded, plan=chosen, weights=weights, zero_parts=zero_parts, writable=not planned)
        written = publish(
            pruned, output, overwrite=overwrite, zero_parts=zero_parts, shard_size=shard_size, config=config_text(),
            adapter=adapter, planned=planned, progress=progress,
        )  # fmt: skip
    text = f"proved and written to {written.folder}: {chosen}, {written.params:,} parameters"
    text += "" if adapter is None else f"; its adapter: {written.folder / 'adapter'}"
    data = {"output": str(written.folder), "plan": str(chosen), "proof": written.proof.to_dict()}
    _emit(data, text, written, as_json=json_)


def _emit(data: dict[str, Any], text: str, made: Written | Streamed, *, as_json: bool) -> None:
    """The result; which tensors of the base are not in the new folder, as no layer is theirs; which of its layers are
    half zeros."""
    from shoal.writing.left_out import listed

    text += f"\nleft out, as no part of the model: {listed(made.left_out)}" if made.left_out else ""
    text += f"\na whole layer each, with zeros in its other part: {listed(made.zeroed)}" if made.zeroed else ""
    emit(data | {"left_out": list(made.left_out), "zeroed": list(made.zeroed)}, text, as_json=as_json)


def _require_adapter_fits(adapter: Path | None, stream: bool, output: Path) -> None:
    if adapter is not None and (stream or output.suffix == ".gguf"):
        raise UsageError(
            "an adapter is written beside a folder whose base is loaded; leave --stream, .gguf or --adapter out",
            code="U672",
        )


def _asks_planned(as_: str, output: Path, others: dict[str, Any]) -> bool:
    """Whether a planned checkpoint is asked for. U525 for options that it does not have, and for a .gguf output."""
    if as_ != "planned":
        return False
    wrong = next((name for name, value in others.items() if value), None)
    wrong = f"--output {output.name}" if output.suffix == ".gguf" else wrong
    if wrong is not None:
        raise UsageError(f"{wrong} belongs to a stock checkpoint; leave it or --as planned out", code="U525")
    return True


def _refuse_gguf_options(given: dict[str, Any]) -> None:
    """U525 for options that only a .gguf output has."""
    wrong = next((name for name, value in given.items() if value is not None), None)
    if wrong is not None:
        raise UsageError(f"{wrong} belongs to an --output that ends in .gguf; leave it out", code="U525")


def _dequantised(model: str) -> str:
    """What --stream does not say by itself of a GGUF base: no checkpoint holds its blocks."""
    from shoal.models.load import gguf_file

    if gguf_file(model) is None:
        return ""
    return ", from the float32 copy of the .gguf file (an --output ending in .gguf keeps its blocks as they are)"


def _require_options_fit(stream: bool, forward: bool, others: dict[str, Any]) -> None:
    """U525 for options of which one makes the other void."""
    wrong = next((name for name, value in others.items() if value), None) if stream else None
    if wrong is not None:
        raise UsageError(f"--stream loads nothing, so {wrong} has no effect; leave one of them out", code="U525")
    if forward and not stream:
        raise UsageError("--forward belongs to --stream; without it the forward check is always made", code="U525")


def _stream(model: str, plan: str | None, output: Path, **options: Any) -> Any:
    from shoal.models.load import inspect_source, local_folder
    from shoal.record import Record, command_line
    from shoal.writing.folder import refuse_output
    from shoal.writing.stream import stream

    refuse_output(output, overwrite=options["overwrite"])
    local_folder(model)
    spec = inspect_source(model, trust_remote_code=options["trust_remote_code"])
    chosen = read_plan(plan, spec, model)
    command = command_line()
    record = Record(
        "write", {"plan": str(chosen), "stream": True}, plan=chosen.hash, base=spec.fingerprint, command=command
    )
    return stream(
        model,
        chosen,
        output,
        weights=read_weights(plan),
        records=[record.to_dict()],
        command=" ".join(command),
        config=config_text(),
        **options,
    )
