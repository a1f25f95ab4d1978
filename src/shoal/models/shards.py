"""Where each tensor of a safetensors folder lies, byte by byte; every claim of index and headers is checked first."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from shoal.errors import ModelError
from shoal.models.checkpoint import INDEX, PLANNED_INDEX, nameable, read_header, read_json, tensor_headers
from shoal.models.folder_kinds import refuse_adapter, refuse_other_kind

SINGLE, PLANNED_SINGLE = "model.safetensors", "planned.safetensors"
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """The place of one tensor."""

    file: Path
    dtype: str
    """As the header calls it: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """Its first byte, counted from the beginning of the file."""
    size: int
    """Bytes."""


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """{tensor: its place} of all files that transformers would read.

    Raises `ModelError`: M308 pickle only, M309 a file that is missing, damaged or outside the folder, an index that
    names another file than the one that holds a tensor, a tensor held twice, M357 one file beside an index of others.
    """
    single, index = _names(folder)
    weight_map = _weight_map(folder)
    files = sorted(set(weight_map.values())) if weight_map is not None else [single]
    for name in files:
        require_inside(folder, name)
    found: dict[str, Stored] = {}
    for name in files:
        for tensor, place in read_places(folder / name).items():
            if tensor in found:
                raise ModelError(
                    f"{folder} holds the tensor {tensor} twice, in {found[tensor].file.name} and in {name}; "
                    "remove one of them",
                    code="M309",
                )
            found[tensor] = place
    for tensor, name in (weight_map or {}).items():
        if tensor not in found or found[tensor].file.name != name:
            raise ModelError(
                f"{folder / index} says that {name} holds the tensor {tensor}, which it does not; copy the files again",
                code="M309",
            )
    return found


def check_folder(folder: Path) -> dict[str, Stored]:
    """`stored_tensors` of a folder with a config. Raises what `read_config` and `stored_tensors` raise."""
    read_config(folder)
    return stored_tensors(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises `ModelError`: M302 there is none, or it, or the config for generation beside
    it, is no JSON object; M358 a config that names other files of weights; M370-M378 another kind of folder."""
    file, generation = folder / "config.json", folder / "generation_config.json"
    refuse_adapter(folder)
    if not file.is_file():
        refuse_other_kind(folder)
        raise ModelError(f"{folder} has no config.json; give the folder of a Hugging Face model", code="M302")
    config = read_json(file)
    if generation.is_file():
        read_json(generation)  # transformers takes one that it cannot parse for none
    elsewhere = config.get("transformers_weights")
    if elsewhere not in (None, SINGLE, INDEX):
        raise ModelError(
            f"{file} says that transformers reads its weights from {str(elsewhere)[:80]} (transformers_weights); "
            f"rename them to {SINGLE} and take the key away",
            code="M358",
        )
    return config


def read_places(file: Path) -> dict[str, Stored]:
    """{tensor: its place} of one safetensors file. Raises M309 when its header contradicts itself or the file."""
    read_header(file)
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_doubles)
        header.pop("__metadata__", None)
        places = {name: _place(file, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the header of {file} is wrong ({error}); copy it again", code="M309") from None
    spans = sorted((p.start, p.start + p.size) for p in places.values())
    if spans and (spans[0][0] != 8 + length or any(a[1] != b[0] for a, b in pairwise(spans))):
        raise ModelError(
            f"the header of {file} is wrong (its tensors overlap or leave gaps); copy it again", code="M309"
        )
    return places


def _place(file: Path, entry: dict[str, Any], offset: int) -> Stored:
    dtype, shape, (first, end) = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, first, end)) or end < first:
        raise ValueError(f"shape {shape}, bytes {first} to {end}")
    bits = _BITS.get(dtype)
    if bits is None:
        raise ValueError(f"no reader knows the dtype {dtype[:20]!r}")
    if (end - first) * 8 != math.prod(shape) * bits:
        raise ValueError(f"{end - first} bytes for a {dtype} of shape {shape}")
    return Stored(file, dtype, tuple(shape), offset + first, end - first)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _names(folder: Path) -> tuple[str, str]:
    """What the one file of a checkpoint is called, and the index of several; a planned checkpoint has names of its
    own, which no other class finds."""
    stock, planned = (SINGLE, INDEX), (PLANNED_SINGLE, PLANNED_INDEX)
    own = any((folder / name).is_file() for name in planned)
    return planned if own and not any((folder / name).is_file() for name in stock) else stock


def _weight_map(folder: Path) -> dict[str, str] | None:
    """The index; None for a folder with one file."""
    single, name = _names(folder)
    index = folder / name
    if not index.is_file():
        if not (folder / single).is_file():
            tensor_headers(folder)  # says what the folder holds instead
            raise ModelError(f"{folder} has neither {single} nor {name}; copy the index too", code="M309")
        return None
    found = weight_map(read_json(index), str(index))
    if (folder / single).is_file() and set(found.values()) != {single}:
        raise ModelError(
            f"{folder} has a {single} and an index of other files; transformers would read the one, other programs the "
            "others: remove what is left over",
            code="M357",
        )
    return found


def weight_map(index: dict[str, Any], where: str) -> dict[str, str]:
    """{tensor: file} of the content of an index. Raises M309."""
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise ModelError(f"{where} has no weight_map; copy the index again", code="M309")
    return found


def require_inside(folder: Path, name: str) -> None:
    """A file of this very folder; a link may lead to its neighbours, or to the blobs of the hub's cache."""
    if name != Path(name).name or "\\" in name or name in ("", ".", "..") or not nameable(name):
        raise ModelError(
            f"{folder / _names(folder)[1]} names {name[:80]!r}, which is no file of the folder; mend it", code="M309"
        )
    file, home = folder / name, folder.resolve()
    if not file.is_file():
        raise ModelError(f"{folder} lacks {name}, which its index names; copy it there", code="M309")
    cached = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if file.resolve().parent not in (home, cached):
        raise ModelError(f"{file} is a link to a file outside its folder; copy the file there", code="M309")
