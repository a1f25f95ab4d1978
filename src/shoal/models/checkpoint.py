"""Is this folder a sound safetensors checkpoint? Answered from its config and headers, before a weight is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from shoal.errors import ModelError
from shoal.models.folder_kinds import pickled_weights, refuse_other_kind

_MAX_JSON = 100_000_000


INDEX, PLANNED_INDEX = "model.safetensors.index.json", "planned.safetensors.index.json"
"""The index of a checkpoint in several files; that of a planned checkpoint."""


def tensor_headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (dtype, shape)} of all safetensors files of a folder, read from their headers alone."""
    found, _ = _headers(folder)
    return found


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, those of its index where it has one; headers and sizes are checked as in
    `tensor_headers`."""
    _, files = _headers(folder)
    return files


def _headers(folder: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], list[Path]]:
    index = next((folder / name for name in (INDEX, PLANNED_INDEX) if (folder / name).is_file()), folder / INDEX)
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ModelError(f"{index} has no weight_map; copy the index again", code="M309")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if file.parent != folder or not nameable(file.name) or not file.is_file():
                raise ModelError(
                    f"{index} names {file.name[:80]}, which is not in the folder; copy it there", code="M309"
                )
    else:
        files = sorted(folder.glob("*.safetensors"))
        weight_map = None
    if not files:
        pickles = pickled_weights(folder)
        if pickles:
            raise ModelError(
                f"{folder} has its weights only as pickle ({pickles[0]}), which can run code when it is read; "
                "convert them to safetensors first",
                code="M308",
            )
        refuse_other_kind(folder)
        raise ModelError(f"{folder} has no weights (*.safetensors)", code="M309")
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        headers |= read_header(file)
    missing = sorted(set(weight_map or ()) - set(headers))
    if missing:
        raise ModelError(
            f"{index} names the tensor {missing[0]}, which no file holds; copy the files again", code="M309"
        )
    return headers, files


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (dtype, shape)} of one safetensors file. Raises M309 when the file is damaged or too short."""
    damaged = f"{file} is not a complete safetensors file"
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length + 8 > size or length > _MAX_JSON:
                raise ModelError(f"{damaged} (its header does not fit); copy it again", code="M309")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if ends and max(ends) + 8 + length != size:
            raise ModelError(
                f"{damaged} ({size:,} bytes, its header says {max(ends) + 8 + length:,}); copy it again", code="M309"
            )
        return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ModelError(f"{damaged} (its header cannot be read); copy it again", code="M309") from None
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}", code="M309") from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises M302."""
    try:
        if file.stat().st_size > _MAX_JSON:
            raise ModelError(f"{file} is larger than {_MAX_JSON // 1_000_000} MB; this is not a config", code="M302")
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise ModelError(f"{file} is not valid JSON; copy it again", code="M302") from None
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}", code="M302") from None
    if not isinstance(data, dict):
        raise ModelError(f"{file} is not a JSON object; copy it again", code="M302")
    return data


def nameable(name: str) -> bool:
    """Can a file have this name? Where it cannot, looking for it raises errors of several kinds."""
    return len(name.encode(errors="replace")) < 256 and name.isprintable()


def read_json_list(file: Path) -> list[Any]:
    """A JSON list from a file; empty when there is none. Raises M302 for anything else."""
    if not file.is_file():
        return []
    try:
        data = json.loads(file.read_bytes()) if file.stat().st_size <= _MAX_JSON else None
    except (ValueError, RecursionError, OSError):
        data = None
    if not isinstance(data, list):
        raise ModelError(f"{file} is not a JSON list; copy it again", code="M302")
    return data
