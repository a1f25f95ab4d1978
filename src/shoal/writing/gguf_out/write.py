"""A plan as a GGUF file: which of the two ways, and its proof."""

from __future__ import annotations

from pathlib import Path

from shoal.errors import PlanError, WriteError
from shoal.evaluation import Progress
from shoal.models.gguf_source import Source, open_source, spec_of
from shoal.models.load import Loaded, inspect_source, load
from shoal.plan import Plan, Spec, is_plan_file, load_plan, parse_plan, require
from shoal.writing.checks import Check
from shoal.writing.gguf_out.container import TYPES
from shoal.writing.gguf_out.converted import OUTTYPES, converted
from shoal.writing.gguf_out.copied import GgufManifest, copied_manifest
from shoal.writing.gguf_out.forward import forward_check, is_exact
from shoal.writing.gguf_out.published import Forward, Written, publish_file, refuse_file

__all__ = ["Written", "convert_model", "copy_file", "open_source", "plan_for", "refuse_file"]


def plan_for(source: Source, text: str | None, name: str) -> tuple[Plan, Spec]:
    """The plan that a user typed for a GGUF file (all layers without one), and the Spec that it was checked against.

    The Spec comes from the file's header. Only a saved plan whose fingerprint is another is held against the model
    that transformers makes of the file, which takes a conversion. Raises `NotationError`, `PlanError`.
    """
    spec = spec_of(source)
    identity = Plan.identity(spec, source=name)
    if text is None:
        return identity, spec
    if not is_plan_file(text):
        return require(parse_plan(text, identity), spec), spec
    plan = load_plan(text)
    try:
        return require(plan, spec), spec
    except PlanError as error:
        if error.code != "P101" or plan.base.depths != (("decoder", source.depth),):
            raise
        full = inspect_source(source.path)
        return require(plan, full), full


def copy_file(
    source: Source,
    plan: Plan,
    output: str | Path,
    *,
    outtype: str | None = None,
    overwrite: bool = False,
    forward: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write `plan` on the layers of a GGUF file as another GGUF file: blocks bit for bit, metadata permuted, no torch.

    `outtype`: convert matrices to f32, f16, bf16 or q8_0 instead. `forward`: afterwards let transformers load both and
    compare logits. Raises as `copied_manifest` (W261-W264), `forward_check` (W269) and `publish_file` (W220-W230).
    """
    require_outtype(outtype)
    manifest = copied_manifest(source, plan, outtype=outtype)
    check: Forward | None = None
    if forward:
        base = load(str(source.path), device="cpu")
        kinds = {tensor.tensor_type.name for tensor in source.tensors if len(tensor.shape) > 1}

        def check(file: Path) -> Check:
            return forward_check(file, base, plan, outtype=outtype, exact=is_exact(outtype, kinds))

    against = "the tensors of its base, by SHA-256"
    return publish_file(
        manifest,
        output,
        source=source.path,
        overwrite=overwrite,
        forward=check,
        against=against if outtype is None else f"{against} after rounding to {outtype}",
        progress=progress,
    )


def convert_model(
    loaded: Loaded,
    plan: Plan,
    output: str | Path,
    *,
    outtype: str | None = None,
    tokenizer_from: Path | None = None,
    zero_parts: bool = False,
    overwrite: bool = False,
    forward: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write the stock model of `plan` on `loaded` as a GGUF file. Options as in `converted` and `copy_file`.

    Raises as `converted` (W201-W216, W263, W265-W268), `forward_check` (W269) and `publish_file` (W220-W230).
    """
    require_outtype(outtype)
    manifest: GgufManifest = converted(
        loaded, plan, outtype=outtype, tokenizer_from=tokenizer_from, zero_parts=zero_parts
    )
    check: Forward | None = None
    if forward:
        chosen = outtype or OUTTYPES.get(loaded.model.dtype, "f16")
        stored = {TYPES[OUTTYPES[loaded.model.dtype]][0].name} if loaded.model.dtype in OUTTYPES else {"other"}

        def check(file: Path) -> Check:
            return forward_check(file, loaded, plan, outtype=chosen, exact=is_exact(chosen, stored))

    return publish_file(
        manifest,
        output,
        source=tokenizer_from,
        overwrite=overwrite,
        forward=check,
        against="what llama.cpp's rules of conversion make of the model's tensors, by SHA-256",
        progress=progress,
    )


def require_outtype(outtype: str | None) -> None:
    """Raise W264 for a type that is not written."""
    if outtype is not None and outtype not in TYPES:
        raise WriteError(f"no GGUF file of type {outtype!r:.40} is written; use {', '.join(TYPES)}", code="W264")
