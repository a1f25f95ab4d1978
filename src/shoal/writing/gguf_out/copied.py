"""The keys and tensors of a pruned GGUF file, taken from the file of its base: nothing is requantised."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from gguf import GGUFValueType, ReaderTensor, size_label

from shoal._version import __version__
from shoal.errors import WriteError
from shoal.models import gguf_rules as rules
from shoal.models.gguf_source import Source, plain
from shoal.plan import Plan, Run, format_steps
from shoal.plan.capabilities import refusal
from shoal.writing.gguf_out.container import TYPES, Item, Pairs, decoded, encoded, kind_for

PATTERN = "attention.sliding_window_pattern"
Value = tuple[Any, GGUFValueType, GGUFValueType | None]


@dataclass(frozen=True)
class GgufManifest:
    """All that a GGUF file will hold: known before a byte is written."""

    arch: str
    pairs: Pairs
    items: tuple[Item, ...]
    base_layers: tuple[int, ...]
    """For each layer the layer of the original base that it is."""

    @property
    def bytes(self) -> int:
        """Of the tensors."""
        return sum(item.bytes for item in self.items)


def slots_of(plan: Plan) -> tuple[int, ...]:
    """The base layer of each layer of the new file. Raises `WriteError` W261 for a step that is no whole layer."""
    if no := refusal(plan.steps(), "gguf"):
        raise WriteError(no.message, code=no.code)
    return plan.layers()


def copied_manifest(source: Source, plan: Plan, *, outtype: str | None = None) -> GgufManifest:
    """The file of `plan`, whose base is `source`: layers renumbered, every per-layer array of the metadata permuted.

    `outtype`: convert the matrices to f32, f16, bf16 or q8_0; None keeps every block bit for bit.
    Raises `WriteError` W261, W262 for an architecture or a key that gives layers a kind by their place, W263 for a
    depth at which llama.cpp scales attention otherwise, W264 for a type that cannot be converted.
    """
    slots = slots_of(plan)
    _require_known(source, slots)
    items = tuple(_items(source, slots, outtype))
    pairs = {key: plain(field) for key, field in source.fields.items() if not key.startswith("GGUF.")}
    pairs |= _permuted(source, slots) | _note(source, plan, slots)
    if outtype is not None:
        pairs["general.file_type"] = (TYPES[outtype][1], GGUFValueType.UINT32, None)
    if "general.size_label" in pairs and not source.value("expert_count"):
        total = sum(math.prod(item.shape) for item in items)
        pairs["general.size_label"] = (size_label(total, 0, 0, 0).encode(), GGUFValueType.STRING, None)
    return GgufManifest(source.arch, pairs, items, tuple(pairs["shoal.base_layers"][0]))


def _require_known(source: Source, slots: Sequence[int]) -> None:
    if tuple(slots) == tuple(range(source.depth)):
        return
    arch = source.arch
    if arch not in rules.UNIFORM and arch not in rules.WINDOWS:
        raise WriteError(
            f"it is not known what llama.cpp makes of a layer's place in {arch} models; prune the transformers model "
            "and convert its folder with llama.cpp's convert_hf_to_gguf.py",
            code="W262",
        )
    counted = next((key for key in rules.COUNTED if source.value(key)), None)
    if counted is not None:
        raise WriteError(
            f"{source.path.name} has {arch}.{counted} = {source.value(counted)}, which gives layers another kind by "
            "their place; prune the transformers model and convert its folder with convert_hf_to_gguf.py",
            code="W262",
        )
    require_scale(arch, source.depth, len(slots))


def require_scale(arch: str, depth: int, after: int) -> None:
    """Raise W263 when llama.cpp would take the model of `after` layers, or its base of `depth`, for another size."""
    special = rules.SCALED.get(arch)
    if special is not None and depth != after and special in (depth, after):
        raise WriteError(
            f"llama.cpp scales attention otherwise in a {arch} of exactly {special} layers, so {depth} layers cannot "
            f"become {after}; serve this plan with transformers",
            code="W263",
        )


def _permuted(source: Source, slots: Sequence[int]) -> dict[str, Value]:
    """Block count, and every array of the architecture that has one entry per layer."""
    changed: dict[str, Value] = {f"{source.arch}.block_count": (len(slots), GGUFValueType.UINT32, None)}
    whole = tuple(slots) == tuple(range(source.depth))
    for key, field in source.lists():
        value, kind, entries = plain(field)
        if len(value) == source.depth:
            changed[key] = ([value[i] for i in slots], kind, entries)
        elif not whole:
            raise WriteError(
                f"{source.path.name} lists {len(value)} values as {key} for {source.depth} layers, and it is not known "
                "which belong to which; prune the transformers model and convert its folder with convert_hf_to_gguf.py",
                code="W260",
            )
    if source.value("attention.sliding_window") or source.arch in ("gemma2", "cohere2"):
        changed |= windows(source.arch, source.value(PATTERN), slots)
    return changed


def windows(arch: str, stated: Any, slots: Sequence[int]) -> dict[str, Value]:
    """The sliding layers of a model whose layers are `slots` of its base, as an array where llama.cpp's own rule
    (`stated`, or the architecture's) would give a layer another kind than it had."""
    if arch not in rules.WINDOWS or isinstance(stated, list):
        return {}
    every = stated if type(stated) is int and stated > 0 else rules.WINDOWS[arch]
    kept = [i % every < every - 1 for i in slots]
    if kept == [i % every < every - 1 for i in range(len(slots))]:
        return {}
    return {f"{arch}.{PATTERN}": (kept, GGUFValueType.ARRAY, GGUFValueType.BOOL)}


def _items(source: Source, slots: Sequence[int], outtype: str | None) -> Iterator[Item]:
    # token_embd before the layers, the rest behind them, as in most files
    yield from (_item(tensor.name, tensor, outtype) for tensor in source.outside[:1])
    for slot, layer in enumerate(slots):
        yield from (_item(f"blk.{slot}.{name}", tensor, outtype) for name, tensor in source.layers[layer])
    yield from (_item(tensor.name, tensor, outtype) for tensor in source.outside[1:])


def _item(name: str, tensor: ReaderTensor, outtype: str | None) -> Item:
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    if outtype is None:
        return Item(name, shape, tensor.tensor_type, lambda: tensor.data)
    kind = kind_for(outtype, shape)
    if kind == tensor.tensor_type:
        return Item(name, shape, kind, lambda: tensor.data)
    return Item(name, shape, kind, partial(_converted, tensor, kind))


def _converted(tensor: ReaderTensor, kind: Any) -> Any:
    try:
        return encoded(decoded(tensor.data, tensor.tensor_type), kind)
    except NotImplementedError:
        raise WriteError(
            f"the tensor {tensor.name} is {tensor.tensor_type.name}, which the package gguf cannot convert; leave "
            "--outtype out to copy it as it is",
            code="W264",
        ) from None


def _note(source: Source, plan: Plan, slots: Sequence[int]) -> dict[str, Value]:
    """Where the layers come from: a base that was itself pruned hands its own numbers on."""
    known = source.fields.get("shoal.base_layers")
    before = known.contents() if known is not None else None
    if isinstance(before, list) and len(before) == source.depth and all(isinstance(i, int) for i in before):
        base = source.fields.get("shoal.base")
        return note([int(before[i]) for i in slots], str(base.contents()) if base is not None else "{}")
    facts = {"family": plan.base.family, "fingerprint": plan.base.fingerprint, "layers": dict(plan.base.depths)}
    return note(slots, json.dumps({**facts, "source": source.path.name}))


def note(base_layers: Sequence[int], base: str, plan: str | None = None) -> dict[str, Value]:
    """The keys `shoal.*`, which llama.cpp ignores. `base`: JSON of {family, fingerprint, layers, source}."""
    text = plan or format_steps(tuple(Run(i) for i in base_layers))
    return {
        "shoal.plan": (text.encode(), GGUFValueType.STRING, None),
        "shoal.base_layers": (list(base_layers), GGUFValueType.ARRAY, GGUFValueType.UINT32),
        "shoal.base": (base.encode(), GGUFValueType.STRING, None),
        "shoal.version": (__version__.encode(), GGUFValueType.STRING, None),
    }
