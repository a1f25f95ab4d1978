"""One GGUF file written tensor by tensor, beside its place, with the SHA-256 of all that was written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from shoal.writing.container import Tick

Pairs = Mapping[str, tuple[Any, GGUFValueType, GGUFValueType | None]]
"""{key: (value, type, type of an array's entries)}"""
ALIGNMENT = "general.alignment"
TYPES = {
    "f32": (GGMLQuantizationType.F32, 0),
    "f16": (GGMLQuantizationType.F16, 1),
    "bf16": (GGMLQuantizationType.BF16, 32),
    "q8_0": (GGMLQuantizationType.Q8_0, 7),
}
"""Name: the type of a tensor, and the number of a file that is mostly of it (`general.file_type`)."""


@dataclass(frozen=True)
class Item:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    """As numpy and torch count, rows first; the file holds it reversed."""
    kind: GGMLQuantizationType
    load: Callable[[], np.ndarray[Any, Any]]
    """Its bytes, in any dtype."""

    @property
    def bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size


def kind_for(outtype: str, shape: Sequence[int]) -> GGMLQuantizationType:
    """The type of a tensor in a file of `outtype`: vectors stay float32, and rows that do not fill whole blocks of 32
    are float16, as llama.cpp's own converter has it."""
    kind = TYPES[outtype][0]
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def encoded(values: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """float32 values as the bytes of `kind`."""
    return quantize(np.ascontiguousarray(values, dtype=np.float32), kind)


def decoded(data: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """The float32 values of a tensor's bytes. Raises `NotImplementedError` for a type that gguf cannot read."""
    return dequantize(np.ascontiguousarray(data), kind)


def digest(data: np.ndarray[Any, Any]) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data).hexdigest()


def write_file(file: Path, arch: str, pairs: Pairs, items: Sequence[Item], tick: Tick) -> dict[str, str]:
    """Write the keys `pairs` and the tensors `items`, one in memory at a time; {tensor: SHA-256 of its bytes}.

    `tick` hears of every tensor's bytes. Raises `OSError`.
    """
    writer = GGUFWriter(None, arch)
    if ALIGNMENT in pairs:
        writer.add_custom_alignment(int(pairs[ALIGNMENT][0]))
    for key, (value, kind, entries) in pairs.items():
        if key not in (ALIGNMENT, "general.architecture") and not (kind == GGUFValueType.ARRAY and not len(value)):
            writer.add_key_value(key, value, kind, entries)
    for item in items:
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), item.bytes, raw_dtype=item.kind)
    sums = {}
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for item in items:
            data = item.load()
            sums[item.name] = digest(data)
            writer.write_tensor_data(np.ascontiguousarray(data))
            tick(item.bytes)
    finally:
        writer.close()
    return sums
