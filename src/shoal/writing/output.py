"""Where a folder may be written, room for it, and the disk's failures as one sentence each."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from shoal.atomic import sweep
from shoal.errors import WriteError
from shoal.plan import Plan

_SPARE = 32_000_000
"""Bytes beside the tensors: tokenizer, side files, report."""
_MODEL_FILES = ("config.json", "shoal", "model.safetensors", "model.safetensors.index.json")


def refuse_output(output: str | Path, *, overwrite: bool = False) -> None:
    """Raise W220, W222, W224 or W225 when nothing may or can be written to `output`; a long search asks this first.
    What killed writes left beside it is removed."""
    final = final_path(output)
    if final.suffix == ".gguf":
        raise WriteError(f"a folder is written here, and {final.name} would be a file; use `shoal write`", code="W225")
    if not final.parent.is_dir():
        raise WriteError(f"there is no folder {final.parent} to write {final.name} into; make it first", code="W222")
    if not os.access(final.parent, os.W_OK | os.X_OK):
        raise WriteError(f"no permission to write into {final.parent}; choose another output", code="W224")
    sweep(final)
    if not final.exists():
        return
    if not overwrite:
        raise WriteError(f"{final} exists; pass --overwrite to replace it, or choose another output", code="W220")
    if not final.is_dir() or (any(final.iterdir()) and not any((final / name).exists() for name in _MODEL_FILES)):
        raise WriteError(f"{final} is not the folder of a model, so it is not overwritten; choose another", code="W225")


def final_path(output: str | Path) -> Path:
    """Where the folder will be; a symlink is followed, so that what it points to is replaced and not the link."""
    return Path(output).expanduser().resolve()


def with_source(plan: Plan, name: str) -> Plan:
    """The plan with the place of its base, so that `verify` finds it; a folder by its absolute path."""
    path = Path(name).expanduser()
    source = str(path.resolve()) if path.exists() else name
    return replace(plan, base=replace(plan.base, source=source))


def require_apart(final: Path, sources: Iterable[Path]) -> None:
    """Raise W221 when the output lies in a folder of the base or holds it: the base is still read while it is
    written."""
    for source in {place.resolve() for place in sources if place.exists()}:
        if final.is_relative_to(source) or source.is_relative_to(final):
            raise WriteError(f"the output {final} and the source {source} overlap; choose another output", code="W221")


def require_space(final: Path, tensors: int) -> None:
    """Raise W223 when the disk has no room for `tensors` bytes and what lies beside them."""
    free = shutil.disk_usage(final.parent).free
    if free < tensors + _SPARE:
        raise WriteError(
            f"{final.parent} has {free / 1e9:.2f} GB free and the model needs {(tensors + _SPARE) / 1e9:.2f} GB; "
            "make room or choose another output",
            code="W223",
        )


@contextmanager
def disk_errors(final: Path) -> Iterator[None]:
    """Failures of the disk as W223, W224 and W226; the staged folder is gone by then."""
    try:
        yield
    except OSError as error:
        raise _disk_error(final, error.errno or 0, error.strerror or str(error)) from error
    except Exception as error:  # safetensors and tokenizers raise classes of their own, which are no OSErrors
        number = next((n for n in (errno.ENOSPC, errno.EDQUOT) if f"os error {n})" in str(error)), 0)
        if not number and type(error).__name__ != "SafetensorError":
            raise
        raise _disk_error(final, number, str(error)) from error


def _disk_error(final: Path, number: int, why: str) -> WriteError:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return WriteError(f"the disk of {final.parent} is full; make room or choose another output", code="W223")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return WriteError(f"no permission to write {final} ({why}); choose another output", code="W224")
    return WriteError(f"cannot write {final}: {why}; choose another output", code="W226")


def write_text(file: Path, text: str) -> None:
    """UTF-8, with the same line ends on every system."""
    file.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def savable() -> Iterator[None]:
    """A config that transformers refuses to save as W216."""
    try:
        yield
    except (ValueError, StrictDataclassError) as error:
        why = " ".join(str(error).split())[:300]  # its first line alone says that something is wrong, not what
        raise WriteError(
            f"transformers will not save the model's configs: {why}; mend them first", code="W216"
        ) from error
