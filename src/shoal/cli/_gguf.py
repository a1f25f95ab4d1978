"""shoal write MODEL --output NAME.gguf: a plan as one GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.cli._shared import emit, loading, open_model, progress_bars, read_plan
from shoal.errors import UsageError


@dataclass(frozen=True)
class Wanted:
    """What the user typed."""

    model: str
    plan: str | None
    output: Path
    outtype: str | None
    tokenizer_from: Path | None
    zero_parts: bool
    overwrite: bool
    forward: bool
    stream: bool
    device: str | None
    dtype: str | None
    trust_remote_code: bool

    @property
    def name(self) -> str:
        """The type in words."""
        return self.outtype or "as stored"


def write_gguf(wanted: Wanted, *, json_: bool, quiet: bool, dry_run: bool) -> None:
    """Copy a GGUF base, or convert another model."""
    from shoal.models.gguf import require_package
    from shoal.models.load import gguf_file

    require_package()
    from shoal.writing.gguf_out.write import refuse_file, require_outtype

    require_outtype(wanted.outtype)
    file = gguf_file(wanted.model)
    if file is not None:
        options = ("--device", "--dtype", "--trust-remote-code", "--tokenizer-from", "--zero-parts")
        _refuse(wanted, "is copied from file to file", *options)
    elif wanted.stream:
        raise UsageError(f"--stream copies files, but {wanted.model} is converted; leave it out", code="U525")
    if not dry_run:
        refuse_file(wanted.output, file, overwrite=wanted.overwrite)
    with progress_bars(quiet) as progress:
        data, text = (_copy if file is not None else _convert)(wanted, file, dry_run, progress)
    emit(data, text, as_json=json_)


def _refuse(wanted: Wanted, why: str, *options: str) -> None:
    """U525 for the first option that has no effect."""
    given = vars(wanted)
    wrong = next((o for o in options if given[o.removeprefix("--").replace("-", "_")]), None)
    if wrong is not None:
        raise UsageError(f"{wanted.model} {why}, so {wrong} has no effect; leave it out", code="U525")


def _copy(wanted: Wanted, file: Any, dry_run: bool, progress: Any) -> tuple[dict[str, Any], str]:
    from shoal.writing.gguf_out.copied import copied_manifest
    from shoal.writing.gguf_out.write import copy_file, open_source, plan_for

    source = open_source(file)
    plan, _ = plan_for(source, wanted.plan, wanted.model)
    if dry_run:
        manifest = copied_manifest(source, plan, outtype=wanted.outtype)
        return _sizes(plan, manifest.arch, wanted, manifest.bytes, source.bytes, len(manifest.items))
    written = copy_file(
        source,
        plan,
        wanted.output,
        outtype=wanted.outtype,
        overwrite=wanted.overwrite,
        forward=wanted.forward,
        progress=progress,
    )
    return _result(written, plan, wanted)


def _convert(wanted: Wanted, file: Any, dry_run: bool, progress: Any) -> tuple[dict[str, Any], str]:
    from shoal.models.load import inspect_source, load_config
    from shoal.plan import Plan
    from shoal.writing.gguf_out.converted import sketched
    from shoal.writing.gguf_out.families import family_of
    from shoal.writing.gguf_out.write import convert_model

    config = load_config(wanted.model, trust_remote_code=wanted.trust_remote_code)
    family_of(config)
    if dry_run:
        spec = inspect_source(wanted.model, trust_remote_code=wanted.trust_remote_code)
        plan = read_plan(wanted.plan, spec, wanted.model) or Plan.identity(spec)
        options: dict[str, Any] = {"outtype": wanted.outtype, "zero_parts": wanted.zero_parts}
        sketch, whole = sketched(config, plan, **options), sketched(config, Plan.identity(spec), **options)
        return _sizes(plan, sketch.arch, wanted, sketch.bytes, whole.bytes, sketch.tensors)
    options = loading(wanted.device, wanted.dtype, wanted.trust_remote_code)
    loaded, plan, _ = open_model(wanted.model, wanted.plan, **options)
    plan = plan or Plan.identity(loaded.opened.spec, source=wanted.model)
    written = convert_model(
        loaded,
        plan,
        wanted.output,
        outtype=wanted.outtype,
        tokenizer_from=wanted.tokenizer_from,
        zero_parts=wanted.zero_parts,
        overwrite=wanted.overwrite,
        forward=wanted.forward,
        progress=progress,
    )
    return _result(written, plan, wanted)


def _sizes(plan: Any, arch: str, wanted: Wanted, after: int, before: int, tensors: int) -> tuple[dict[str, Any], str]:
    data = {"plan": str(plan), "arch": arch, "type": wanted.name, "bytes": after, "base_bytes": before}
    text = f"would write {plan} as {arch}, {wanted.name}: {before / 1e6:,.1f} -> {after / 1e6:,.1f} MB of tensors"
    return {**data, "tensors": tensors}, text


def _result(written: Any, plan: Any, wanted: Wanted) -> tuple[dict[str, Any], str]:
    data = {
        "output": str(written.file),
        "plan": str(plan),
        "arch": written.arch,
        "type": wanted.name,
        "bytes": written.bytes,
        "base_layers": list(written.base_layers),
        "proof": written.proof.to_dict(),
    }
    text = f"proved and written to {written.file}: {plan}, {written.arch}, {wanted.name}, {written.bytes / 1e6:,.1f} MB"
    return data, text
