"""Files of a source folder that belong to the model beside its tensors: licenses, templates, vocabularies."""

from __future__ import annotations

import shutil
from pathlib import Path

PATTERNS = (
    "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "chat_template*", "special_tokens*", "added_tokens*",
    "tokenizer*", "vocab*", "merges*", "*.tiktoken", "processor_config.json", "preprocessor_config.json",
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
