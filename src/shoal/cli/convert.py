"""shoal convert: a plan from and to the files of other tools."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.atomic import replacing
from shoal.cli import options
from shoal.cli._shared import emit, need, progress_bars, read_plan
from shoal.errors import UsageError, WriteError

_WRITTEN_OUT = re.compile(r"\s*(?:[\[{].*|(?:--prune-layers[\s=]+)?[\d\s,]+)", re.DOTALL)
"""A list or mapping typed on the command line rather than the name of a file."""


def convert(
    plan: Annotated[str, typer.Argument(help="Notation, a plan.json or its folder; with --from such a file.")],
    to: Annotated[str, typer.Option("--to", help="The format to write; `shoal ls exchange` lists them.")],
    from_: Annotated[str | None, typer.Option("--from", help="The format of PLAN (default: Shoal's own).")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The base model: needed unless PLAN names it.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write this file instead of printing.")] = None,
    trust_remote_code: options.Trust = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Translate a plan between Shoal and other tools' files; refuses what the other format cannot say."""
    from shoal.registry import get

    writer = get("exchange", to).load()()
    reader = get("exchange", from_).load()() if from_ is not None else None
    spec = None
    if model is not None:
        from shoal.models.load import inspect_source

        with progress_bars(quiet):
            spec = inspect_source(model, trust_remote_code=trust_remote_code)
    chosen = _own(plan, spec, model) if reader is None else _foreign(plan, reader, spec, model)
    text = writer.write(chosen, spec)
    if output is not None:
        _save(text, output)
    data = {
        "plan": str(chosen),
        "hash": chosen.hash,
        "from": from_,
        "to": to,
        "text": text,
        "output": None if output is None else str(output),
    }
    emit(data, text if output is None else f"written to {output}: {chosen}", as_json=json_)


def _own(text: str, spec: Any, model: str | None) -> Any:
    from shoal.plan import load_plan

    if spec is None:
        return load_plan(text)
    chosen = read_plan(text, spec, model or "")
    return replace(chosen, base=replace(chosen.base, source=chosen.base.source or model))


def _foreign(text: str, reader: Any, spec: Any, model: str | None) -> Any:
    from shoal.plan import Plan, require

    need(spec, "a plan of another tool does not name its model's layers; give the base model with --model")
    return require(reader.read(_contents(text), Plan.identity(spec, source=model)), spec)


def _contents(text: str) -> str | bytes:
    """What a file holds, or `text` itself when it is a list or mapping. Raises U541 when it is neither."""
    if _WRITTEN_OUT.fullmatch(text):
        return text
    path = Path(text)
    if not path.is_file():
        raise UsageError(f"there is no file {text[:80]!r} to convert; give a file or a list such as 3,7", code="U541")
    return path.read_bytes()


def _save(text: str, path: Path) -> None:
    """A kill leaves the old file or the new one."""
    if path.is_dir():
        raise WriteError(f"cannot write {path}: it is a folder; give the name of a file", code="W215")
    try:
        with replacing(path) as draft:
            draft.write_bytes(text.encode())
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}; choose another place", code="W215") from None
