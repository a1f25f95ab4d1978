"""Copies files of a source folder that belong to the model beside its tensors: licenses, templates, vocabularies."""

from __future__ import annotations

import shutil
from pathlib import Path

from shoal.errors import WriteError
from shoal.models.checkpoint import read_json_list

PATTERNS = (
    "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "chat_template*", "special_tokens*", "added_tokens*",
    "tokenizer*", "vocab*", "merges*", "*.tiktoken", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json",
    "modules.json", "sentence_*_config.json", "config_sentence_transformers.json",
)  # fmt: skip
MAX_BYTES = 5_000_000
_NEVER = (".py", ".pyc", ".so", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy what `PATTERNS` name and `target` has not: text files below 5 MB, no code, no weights, nothing through a
    symlink. Returns the names."""
    names = []
    for file in sorted(source.iterdir()):
        if any(file.match(pattern) for pattern in PATTERNS) and _wanted(file) and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name, follow_symlinks=False)
            names.append(file.name)
    return names


def _wanted(file: Path) -> bool:
    if file.is_symlink() or not file.is_file() or file.suffix.lower() in _NEVER or file.stat().st_size >= MAX_BYTES:
        return False
    try:
        return "\0" not in file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return False


def copy_modules(source: Path, target: Path) -> list[str]:
    """Copy the folders that a sentence-transformers `modules.json` names beside the model (pooling, normalising, a
    dense layer): their JSON and safetensors files, nothing through a symlink. Returns their names.

    Raises `WriteError` W243 for a name that is no folder in `source`, or one whose weights are only there as pickle."""
    names = []
    for module in read_json_list(source / "modules.json"):
        name = module.get("path") if isinstance(module, dict) else None
        if not name:
            continue
        place = source / str(name)
        if Path(str(name)).name != name or name in (".", "..") or place.is_symlink():
            raise WriteError(f"modules.json names {name!r:.60}, which is no folder beside it; mend it", code="W243")
        if place.is_dir():
            _copy_module(place, target / name)
            names.append(name)
    return names


def _copy_module(source: Path, target: Path) -> None:
    files = [file for file in sorted(source.iterdir()) if file.is_file() and not file.is_symlink()]
    kept = [file for file in files if file.suffix == ".safetensors" or (file.suffix == ".json" and _wanted(file))]
    pickles = [file.name for file in files if file.suffix in (".bin", ".pt", ".pth")]
    if pickles and not any(file.suffix == ".safetensors" for file in kept):
        raise WriteError(
            f"{source} has its weights only as pickle ({pickles[0]}), which can run code when it is read; convert them "
            "to safetensors first",
            code="W243",
        )
    target.mkdir()
    for file in kept:
        shutil.copyfile(file, target / file.name, follow_symlinks=False)
