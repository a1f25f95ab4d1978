"""A GGUF file as it lies on the disk: its keys, its tensors by layer, and the Spec that a plan is checked against."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFEndian, GGUFReader, GGUFValueType, ReaderField, ReaderTensor

from shoal.errors import ModelError, WriteError
from shoal.plan import KVSpec, LayerSpec, Spec, StackSpec
from shoal.writing.gguf_out import rules

LAYER = re.compile(r"blk\.(\d+)\.(.+)")
NO_PARTS = "a GGUF file is copied by whole layers"


@dataclass(frozen=True)
class Source:
    """An open GGUF file of a language model."""

    path: Path
    fields: Mapping[str, ReaderField]
    outside: tuple[ReaderTensor, ...]
    """Tensors before and behind the layers, in the order of the file."""
    layers: tuple[tuple[tuple[str, ReaderTensor], ...], ...]
    """For each layer its tensors, named without `blk.N.`."""

    @property
    def arch(self) -> str:
        """llama.cpp's name of the architecture."""
        return bytes(self.fields["general.architecture"].parts[-1]).decode("utf-8", "replace")

    @property
    def depth(self) -> int:
        """Layers."""
        return len(self.layers)

    def value(self, key: str) -> Any:
        """The value of `{arch}.{key}`; None when the file does not say."""
        field = self.fields.get(f"{self.arch}.{key}")
        return None if field is None else field.contents()

    @property
    def tensors(self) -> list[ReaderTensor]:
        """All of them."""
        return [*self.outside, *(tensor for layer in self.layers for _, tensor in layer)]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(int(tensor.n_bytes) for tensor in self.tensors)


def read_fields(path: Path) -> GGUFReader:
    """The reader of a GGUF file. Raises `ModelError` M307 for no file, M315 for one that cannot be read."""
    if not path.is_file():
        raise ModelError(f"there is no file {path}", code="M307")
    try:
        return GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        why = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path} is not a sound GGUF file ({why}); copy or download it again", code="M315") from None


def open_source(path: Path) -> Source:
    """Open a GGUF file for copying; tensors are mapped, not read.

    Raises `ModelError` M307 and M315, and `WriteError` W260 for a file that is only a part of a model or whose layers
    are not the `block_count` layers 0, 1, 2, ....
    """
    reader = read_fields(path)
    fields = reader.fields
    if reader.endianess != GGUFEndian.LITTLE:
        raise WriteError(f"{path} is big-endian, which is not copied; convert it with gguf_convert_endian", code="W260")
    if "general.architecture" not in fields or fields["general.architecture"].types != [GGUFValueType.STRING]:
        raise WriteError(f"{path} names no architecture, so it is no model; give the file of a model", code="W260")
    parts = _number(fields["split.count"].contents()) if "split.count" in fields else 1
    if parts > 1:
        raise WriteError(
            f"{path} is one of {parts} files of a model; join them first (llama-gguf-split --merge)",
            code="W260",
        )
    outside: list[ReaderTensor] = []
    layers: dict[int, list[tuple[str, ReaderTensor]]] = {}
    for tensor in reader.tensors:
        found = LAYER.fullmatch(tensor.name)
        if found is None:
            outside.append(tensor)
        else:
            layers.setdefault(int(found[1]), []).append((found[2], tensor))
    source = Source(path, fields, tuple(outside), tuple(tuple(layers[i]) for i in sorted(layers)))
    stated = source.value("block_count")
    if stated != len(layers) or sorted(layers) != list(range(len(layers))):
        raise WriteError(
            f"{path} says {stated} layers and holds tensors of {len(layers)}; convert or download it again", code="W260"
        )
    return source


def spec_of(source: Source) -> Spec:
    """The Spec of a GGUF file from its header: what `shoal.inspect` says of the dequantised model, as far as the
    architecture's layers are all alike; no FLOPs or parts. A fingerprint may therefore differ where kinds do."""
    hidden = _number(source.value("embedding_length"))
    heads = _listed(source.value("attention.head_count_kv") or source.value("attention.head_count") or 0, source.depth)
    query = _listed(source.value("attention.head_count") or 1, source.depth)
    layers = []
    for index, tensors in enumerate(source.layers):
        key = _number(source.value("attention.key_length")) or hidden // max(1, query[index])
        value = _number(source.value("attention.value_length")) or key
        params = sum(math.prod(t.shape.tolist()) for _, t in tensors)
        flops = sum(2 * math.prod(t.shape.tolist()) for _, t in tensors if len(t.shape) > 1)
        kv = KVSpec("full", heads[index], key, value) if heads[index] else KVSpec("none")
        layers.append(LayerSpec(index, "full_attention", params, flops, query[index] * (key + value), kv))
    shapes = {t.name: t.shape.tolist() for t in source.outside}
    embedding = shapes.get("token_embd.weight", [0, 0])
    other = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("rope"))
    family = rules.FAMILIES.get(source.arch, source.arch)
    stack = StackSpec("decoder", "blk", hidden, tuple(layers))
    return Spec(
        family, (stack,), other, 2 * math.prod(embedding), int(embedding[-1]), probed=False, parts_note=NO_PARTS
    )


def _listed(value: Any, depth: int) -> list[int]:
    return [_number(v) for v in value] if isinstance(value, list) and len(value) == depth else [_number(value)] * depth


def _number(value: Any) -> int:
    """A key's number; 0 for anything else, since a file may say anything."""
    return value if type(value) is int else 0


def plain(field: ReaderField) -> tuple[Any, GGUFValueType, GGUFValueType | None]:
    """(value, type, type of an array's entries) of a key as `GGUFWriter.add_key_value` takes them; strings as bytes, so
    that they are copied as they are. Raises `WriteError` W260 for an array of arrays."""
    kind = field.types[0]
    if kind != GGUFValueType.ARRAY:
        return (bytes(field.parts[-1]) if kind == GGUFValueType.STRING else field.contents()), kind, None
    entries = field.types[-1]
    if len(field.types) > 2 or entries == GGUFValueType.ARRAY:
        raise WriteError(f"the key {field.name} is an array of arrays, which cannot be copied; remove it", code="W260")
    if entries == GGUFValueType.STRING:
        return [bytes(field.parts[i]) for i in field.data], kind, entries
    return field.contents(), kind, entries
