"""A GGUF file as it lies on the disk, checked: its keys, its tensors by layer, and the Spec for plans on it.

Whatever reads or copies a GGUF file opens it here, so that all refuse the same files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TENSOR_NAMES, GGMLQuantizationType, GGUFEndian, GGUFValueType, ReaderField, ReaderTensor

from shoal.errors import ModelError, WriteError, first_line
from shoal.models import gguf_rules as rules
from shoal.plan import KVSpec, LayerSpec, Spec, StackSpec

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
        return None if field is None else _contents(field)

    def lists(self) -> Iterator[tuple[str, ReaderField]]:
        """The arrays that may hold one entry per layer, by key: those of the architecture."""
        for key, field in self.fields.items():
            name = key.removeprefix(f"{self.arch}.")
            own = (name != key and name not in rules.WHOLE) or key.startswith(rules.LISTS_OF_ANY)
            if own and field.types[0] == GGUFValueType.ARRAY:
                yield key, field

    @property
    def tensors(self) -> list[ReaderTensor]:
        """All of them."""
        return [*self.outside, *(tensor for layer in self.layers for _, tensor in layer)]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(int(tensor.n_bytes) for tensor in self.tensors)


def read_fields(path: Path) -> gguf.GGUFReader:
    """The reader of a GGUF file. Raises `ModelError` M307 for no file, M315 for one that cannot be read."""
    if not path.is_file():
        raise ModelError(f"there is no file {path}", code="M307")
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file; give a .gguf file, or a folder", code="M315")
        return gguf.GGUFReader(path)  # looked up here: see compat.gguf_read_once
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}", code="M315") from None
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError) as error:
        why = first_line(error)
        if GGMLQuantizationType.__name__ in why:
            why = f"{why}: damaged, or newer than the installed package gguf"
        raise ModelError(f"{path} is not a sound GGUF file ({why}); copy or download it again", code="M315") from None


def open_source(path: Path) -> Source:
    """Open a GGUF file; tensors are mapped, not read.

    Raises `ModelError` M307 and M315, M310 for a tensor that a layer or the model lacks, and `WriteError` W260 for a
    file that is only a part of a model, whose layers are not the `block_count` layers 0, 1, 2, ..., or whose lists per
    layer have another length.
    """
    reader = read_fields(path)
    fields = reader.fields
    if reader.endianess != GGUFEndian.LITTLE:
        raise WriteError(f"{path} is big-endian, which is not read; convert it with gguf_convert_endian", code="W260")
    if "general.architecture" not in fields or fields["general.architecture"].types != [GGUFValueType.STRING]:
        raise WriteError(f"{path} names no architecture, so it is no model; give the file of a model", code="W260")
    parts = _number(_contents(fields["split.count"])) if "split.count" in fields else 1
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
    _require_layers(source, sorted(layers))
    _require_lists(source)
    _require_tensors(source)
    _require_shapes(source)
    return source


def _require_layers(source: Source, numbers: list[int]) -> None:
    stated = source.value("block_count")
    if stated != len(numbers) or numbers != list(range(len(numbers))):
        said = f"says {stated} layers" if stated is not None else f"has no key {source.arch}.block_count"
        raise WriteError(
            f"{source.path} {said} and holds tensors of {len(numbers)}; convert or download it again", code="W260"
        )


def _require_lists(source: Source) -> None:
    """W260 for a list per layer of another length, which llama.cpp does not load (as llama-quantize --prune-layers
    leaves it)."""
    for key, field in source.lists():
        listed = key.removeprefix(f"{source.arch}.") in rules.PER_LAYER or key.startswith(rules.LISTS_OF_ANY)
        if listed and len(field.data) != source.depth:
            raise WriteError(
                f"{source.path} lists {len(field.data)} values as {key} for {source.depth} layers, where one number or "
                "one for each layer is needed; convert it again",
                code="W260",
            )


def _require_tensors(source: Source) -> None:
    """M310 for tensors that a model of the architecture needs, or that most of its layers have and some lack."""
    if source.arch not in rules.ALIKE:
        return
    missing = [name for name in rules.OUTSIDE if name not in {tensor.name for tensor in source.outside}]
    held = [{name for name, _ in layer} for layer in source.layers]
    needed = set() if source.value("expert_count") else set(rules.NEEDED.get(source.arch, ()))
    if not any(source.value(key) for key in rules.COUNTED):
        counts = Counter(name for names in held for name in names)
        needed |= {name for name, count in counts.items() if 2 * count > source.depth}
    for index, names in enumerate(held):
        instead = {name for name in needed if names & set(rules.INSTEAD.get(name, ()))}
        missing += [f"blk.{index}.{name}" for name in sorted(needed - names - instead)]
    if missing:
        raise ModelError(
            f"{source.path} lacks {len(missing)} tensors of its model, such as {missing[0]}; download it again",
            code="M310",
        )


def _require_shapes(source: Source) -> None:
    """M336 for a tensor of a dense model whose shape is not what the keys say, as far as they do."""
    if source.arch not in rules.NEEDED:
        return
    for index, layer in enumerate(source.layers):
        sizes = _sizes(source, index)
        for name, tensor in layer:
            shape = [int(n) for n in tensor.shape]
            wanted = [sizes.get(size) for size in rules.SHAPES.get(name.removesuffix(".weight"), ())]
            if any(size not in (None, there) for size, there in zip(wanted, shape, strict=False)):
                said = [there if size is None else size for size, there in zip(wanted, shape, strict=False)]
                raise ModelError(
                    f"{source.path}: the tensor {tensor.name} is {shape} in the file, and {said} by its keys; convert "
                    "it again",
                    code="M336",
                )


def _sizes(source: Source, layer: int) -> dict[str, int]:
    """The sizes of a layer's tensors that the keys say."""

    def said(key: str) -> int:
        value = source.value(key)
        return _number(value[layer] if isinstance(value, list) and len(value) == source.depth else value)

    hidden, heads = said("embedding_length"), said("attention.head_count")
    key = said("attention.key_length") or (hidden // heads if heads else 0)
    value = said("attention.value_length") or key
    groups = said("attention.head_count_kv") or heads
    found = {
        "hidden": hidden, "mlp": said("feed_forward_length"), "q": heads * key, "k": groups * key, "v": groups * value,
        "o": heads * value,
    }  # fmt: skip
    return {name: size for name, size in found.items() if size}


def left_over(source: Source) -> tuple[str, ...]:
    """Tensors that no part of a model of the architecture takes, as far as that is known: those beside the needed ones
    for a dense model of `rules.NEEDED`, otherwise those whose names the package gguf knows of no architecture."""
    if source.arch not in rules.ALIKE:
        return ()
    needed = rules.NEEDED.get(source.arch)
    if needed and not source.value("expert_count"):
        known = {*needed, *(name for names in rules.INSTEAD.values() for name in names), *rules.OUTSIDE, *rules.UNUSED}
        return tuple(t.name for t in source.tensors if _rest(t.name) not in known | {"output.weight"})
    forms = {form.replace("{bid}", "0") for form in TENSOR_NAMES.values()}
    named = {t.name: re.sub(r"\.\d+\.", ".0.", t.name) for t in source.tensors}
    return tuple(name for name, form in named.items() if not {form, form.rpartition(".")[0]} & forms)


def _rest(name: str) -> str:
    """A tensor's name inside its layer, or the whole name."""
    found = LAYER.fullmatch(name)
    return found[2] if found is not None else name


def _contents(field: ReaderField) -> Any:
    """The value of a key; None for text that is no text."""
    try:
        return field.contents()
    except UnicodeDecodeError:
        return None


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
