"""The keys and tensors of a GGUF file of a transformers model under a plan, by llama.cpp's own rules of conversion."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFValueType,
    GGUFWriter,
    TensorNameMap,
    get_tensor_name_map,
    size_label,
)
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.errors import WriteError
from shoal.models.load import Loaded
from shoal.models.meta import meta_model
from shoal.plan import Plan
from shoal.writing.blueprint import Blueprint
from shoal.writing.gguf_out.container import TYPES, Item, Pairs, encoded, kind_for
from shoal.writing.gguf_out.copied import GgufManifest, note
from shoal.writing.gguf_out.families import Family, add_keys, changed, family_of, rope_factors
from shoal.writing.gguf_out.vocab import add_vocab, from_file
from shoal.writing.lineage import config_note
from shoal.writing.surgery import blueprint, require_writable, rewrite

OUTTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Sketch:
    """What a GGUF file would hold, without a weight: for --dry-run."""

    arch: str
    outtype: str
    bytes: int
    """Of the tensors."""
    tensors: int


def sketched(config: PreTrainedConfig, plan: Plan, *, outtype: str | None = None, zero_parts: bool = False) -> Sketch:
    """Size and type of the file of `plan` on a model of `config`; refuses what `converted` does, the tokenizer's
    keys aside."""
    family_of(config)
    plans = blueprint(meta_model(config), plan, zero_parts=zero_parts)
    made = meta_model(plans.config)
    family = family_of(plans.config)
    chosen = outtype or OUTTYPES.get(getattr(config, "dtype", None) or torch.float32, "f16")
    items = tuple(_items(made.state_dict(), plans.config, family, chosen))
    return Sketch(family.arch, chosen, sum(item.bytes for item in items), len(items))


def converted(
    loaded: Loaded,
    plan: Plan,
    *,
    outtype: str | None = None,
    tokenizer_from: Path | None = None,
    zero_parts: bool = False,
) -> GgufManifest:
    """The file of `plan` on the model of `loaded`, which is not changed. `outtype`: f32, f16, bf16 or q8_0 for the
    matrices (default: as the model is). `tokenizer_from`: a GGUF file of the same base whose tokenizer keys are taken.

    Raises before any work the W201-W216 of `blueprint` and `require_writable`, W263 and W265 of `family_of`, W266
    and W267 for the tokenizer, W268 for a tensor that llama.cpp has no name for.
    """
    inner = require_writable(loaded.model)
    family_of(inner.config)
    plans = blueprint(inner, plan, zero_parts=zero_parts)
    family = family_of(plans.config)
    chosen = outtype or OUTTYPES.get(inner.dtype, "f16")
    pairs = _pairs(loaded, inner, plans, family, chosen, tokenizer_from)
    made = rewrite(inner, plan, plans=plans)
    items = tuple(_items(made.state_dict(), plans.config, family, chosen))
    total = sum(int(np.prod(item.shape)) for item in items)
    pairs["general.size_label"] = (size_label(total, 0, 0, 0).encode(), GGUFValueType.STRING, None)
    return GgufManifest(family.arch, pairs, items, tuple(pairs["shoal.base_layers"][0]))


def _pairs(
    loaded: Loaded, inner: PreTrainedModel, plans: Blueprint, family: Family, outtype: str, tokenizer_from: Path | None
) -> dict[str, Any]:
    writer = GGUFWriter(None, family.arch)
    writer.add_type("model")
    writer.add_name(Path(loaded.source).name or inner.config.model_type)
    add_keys(writer, plans.config, family)
    writer.add_file_type(TYPES[outtype][1])
    writer.add_quantization_version(2)
    rows = plans.config.vocab_size
    taken: Pairs = {}
    if tokenizer_from is not None:
        taken = from_file(tokenizer_from, rows)
    else:
        add_vocab(writer, loaded.tokenizer, rows)
    known = config_note(inner.config, plans.plan, plans)
    return {**_plain(writer), **taken, **note(known["base_layers"], json.dumps(known["base"]), known["plan"])}


def _plain(writer: GGUFWriter) -> dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]]:
    """A writer's keys as they will be read back: strings as bytes, numbers rounded to float32."""
    found: dict[str, tuple[Any, GGUFValueType, GGUFValueType | None]] = {}
    for key, given in writer.kv_data[0].items():
        values = list(given.value) if given.type == GGUFValueType.ARRAY else [given.value]
        kind = given.type if given.type != GGUFValueType.ARRAY else given.sub_type or GGUFValueType.get_type(values[0])
        values = [_rounded(value, kind) for value in values]
        if given.type == GGUFValueType.ARRAY:
            found[key] = (values, given.type, kind)
        else:
            found[key] = (values[0], given.type, None)
    return found


def _rounded(value: Any, kind: GGUFValueType) -> Any:
    if kind == GGUFValueType.STRING:
        return value.encode() if isinstance(value, str) else value
    if kind == GGUFValueType.FLOAT32:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    return bool(value) if kind == GGUFValueType.BOOL else int(value)


def _items(state: Mapping[str, torch.Tensor], config: PreTrainedConfig, family: Family, outtype: str) -> Iterator[Item]:
    names = _names(family, config)
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise WriteError(
                f"llama.cpp has no name for the tensor {name} of a {family.arch} model; serve the written folder with "
                "transformers",
                code="W268",
            )
        shape = tuple(tensor.shape)
        kind = kind_for(outtype, shape)
        yield Item(new, shape, kind, partial(_load, name, tensor, config, family, kind))
    factors = rope_factors(config)
    if factors is not None:
        data = factors.numpy()
        yield Item("rope_freqs.weight", data.shape, GGMLQuantizationType.F32, lambda: data)


def _names(family: Family, config: Any) -> TensorNameMap:
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    return get_tensor_name_map(arch, config.num_hidden_layers)


def _load(
    name: str, tensor: torch.Tensor, config: PreTrainedConfig, family: Family, kind: GGMLQuantizationType
) -> np.ndarray[Any, Any]:
    return encoded(changed(name, tensor, config, family).numpy(), kind)
