"""Config fields that depend on a layer's index, as data, and the config of a stock model of another depth.

Three kinds of field: lists with one entry per layer (permuted), lists of layer indices (renamed), and numbers from
which the family computes a property of each layer (a period, "the first k are dense"). For the third kind a rule says
how the property follows from the fields and how to find fields that give each kept layer the property it had; when no
such fields exist, the plan cannot be a stock model and is refused by name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from transformers import PreTrainedConfig

from shoal.errors import WriteError

PER_LAYER = (
    "activation_sparsity_pattern", "attention_layers", "indexer_types", "intermediate_size", "kv_sharing_modes",
    "layer_rope_theta", "layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "num_attention_heads",
    "num_attention_heads_per_layer", "num_experts", "num_key_value_heads", "num_key_value_heads_per_layer",
    "sliding_windows", "swiglu_limits", "swiglu_limits_shared",
)  # fmt: skip
"""Fields that hold one entry per layer whenever they are lists of that length."""

INDEX_LISTS = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "local_layer_ids",
    "moe_layers",
    "ple_layer_ids",
    "rope_scaling_layers",
)
"""Fields that list the layers with a property, by index."""

DECODER_DEPTHS = (("decoder_layers", "encoder_layers"), ("num_decoder_layers", "num_encoder_layers"))
"""(decoder's depth, encoder's depth) in configs that have both."""

SYNONYMS = ("num_blocks",)
"""Second names of the depth that some configs keep beside the first, with the same value."""

Fields = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """A property of each layer that a family computes from numbers."""

    fields: tuple[str, ...]
    """All of them must be in the config for the rule to apply."""
    property: Callable[[Fields, int], list[Any]]
    """(fields, depth) -> the property of every layer."""
    candidates: Callable[[Fields, list[Any]], list[Fields]]
    """(old fields, wanted property of every slot) -> new fields worth trying."""


def _first_k(name: str) -> Rule:
    return Rule(
        (name,),
        lambda f, depth: [i < (f[name] or 0) for i in range(depth)],
        lambda f, wanted: [{name: k} for k in range(len(wanted) + 1)],
    )


def _period(period: str, offset: str) -> Rule:
    return Rule(
        (period, offset),
        lambda f, depth: [i % f[period] == f[offset] for i in range(depth)],
        lambda f, wanted: [{period: p, offset: o} for p in range(1, len(wanted) + 2) for o in range(p)],
    )


def _roundings(value: float) -> list[float]:
    """`value` and its neighbours: one of them gives the wanted number to the last bit."""
    low, high = math.nextafter(value, -math.inf), math.nextafter(value, math.inf)
    return [value, low, high, math.nextafter(low, -math.inf), math.nextafter(high, math.inf)]


def _read_from(sources: list[int]) -> list[Any]:
    """None for a layer whose KV it alone reads, else the number of the layer whose KV it shares."""
    return [None if sources.count(source) == 1 else (source, source == i) for i, source in enumerate(sources)]


RULES = (
    _first_k("first_k_dense_replace"),
    _first_k("num_dense_layers"),
    _period("attn_layer_period", "attn_layer_offset"),
    _period("expert_layer_period", "expert_layer_offset"),
    Rule(  # Qwen MoE: a list of exceptions can say anything once the step is 1
        ("decoder_sparse_step", "mlp_only_layers"),
        lambda f, depth: [
            i not in (f["mlp_only_layers"] or []) and (i + 1) % f["decoder_sparse_step"] == 0 for i in range(depth)
        ],
        lambda f, wanted: [
            {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, sparse in enumerate(wanted) if not sparse]}
        ],
    ),
    Rule(  # ERNIE 4.5 MoE
        ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index"),
        lambda f, depth: [
            (i + 1) % f["moe_layer_interval"] == 0
            and i >= f["moe_layer_start_index"]
            and i <= (f["moe_layer_end_index"] if f["moe_layer_end_index"] != -1 else depth - 1)
            for i in range(depth)
        ],
        lambda f, wanted: [
            {"moe_layer_interval": step, "moe_layer_start_index": first, "moe_layer_end_index": last}
            for step, first, last in product(range(1, len(wanted) + 2), range(len(wanted) + 1), range(len(wanted)))
        ],
    ),
    Rule(  # Gemma 3n and 4: the last k layers read KV that earlier ones stored
        ("num_kv_shared_layers",),
        lambda f, depth: [i >= depth - (f["num_kv_shared_layers"] or 0) for i in range(depth)],
        lambda f, wanted: [{"num_kv_shared_layers": k} for k in range(len(wanted))],
    ),
    Rule(  # Mistral Large 4: each layer's own number, or that of the layer whose KV it reads
        ("kv_source_layers",),
        lambda f, depth: _read_from(f["kv_source_layers"]),
        lambda f, wanted: [
            {"kv_source_layers": list(range(len(wanted)))},
            {"kv_source_layers": f["kv_source_layers"][: len(wanted)]},
        ],
    ),
    Rule(  # MiniCPM 3 scales every residual by the root of the depth
        ("scale_depth",),
        lambda f, depth: [f["scale_depth"] / math.sqrt(depth)] * depth,
        lambda f, wanted: [{"scale_depth": value} for value in _roundings(wanted[0] * math.sqrt(len(wanted)))],
    ),
    Rule(  # RecurrentGemma: a pattern that starts again until every layer has its kind
        ("block_types",),
        lambda f, depth: [f["block_types"][i % len(f["block_types"])] for i in range(depth)],
        lambda f, wanted: [{"block_types": wanted}],
    ),
    Rule(  # GPT-Neo: runs of a pattern; one run of length 1 per layer can say anything
        ("attention_types",),
        lambda f, depth: [kind for pattern, times in f["attention_types"] for _ in range(times) for kind in pattern],
        lambda f, wanted: [{"attention_types": [[[kind], 1] for kind in wanted]}],
    ),
)


def depth_fields(config: PreTrainedConfig) -> tuple[str, ...]:
    """The family's own names for the number of layers; the first one is read, all are written.

    A config made for an encoder and a decoder has a depth for each, and `num_hidden_layers` means the encoder's. The
    causal model of it is the decoder alone, but transformers sizes its cache by `num_hidden_layers`.
    """
    for pair in DECODER_DEPTHS:
        if isinstance(getattr(config, pair[0], None), int):
            return tuple(name for name in pair if hasattr(config, name))
    first = str(config.attribute_map.get("num_hidden_layers", "num_hidden_layers"))
    depth = getattr(config, first, None)
    return (first, *(name for name in SYNONYMS if depth is not None and getattr(config, name, None) == depth))


def depth_of(config: PreTrainedConfig) -> int | None:
    """The number of layers of the decoder that `config` describes; None when it does not say."""
    depth = getattr(config, depth_fields(config)[0], None)
    return depth if isinstance(depth, int) else None


def layer_facts(config: PreTrainedConfig, depth: int) -> list[dict[str, Any]]:
    """What the fields of `config` say of each of its `depth` layers, {field or fields: value}: all that
    `permuted_config` carries over from a layer to its new place."""
    old = config.to_dict()
    columns: dict[str, list[Any]] = {name: [i in old[name] for i in range(depth)] for name in _lists(old, INDEX_LISTS)}
    columns |= {name: old[name] for name in _lists(old, PER_LAYER) if len(old[name]) == depth}
    for rule in RULES:
        if all(old.get(name) is not None for name in rule.fields):
            columns[" ".join(rule.fields)] = rule.property({name: old[name] for name in rule.fields}, depth)
    by_layer = old.get("per_layer_config")
    if isinstance(by_layer, dict):
        columns["per_layer_config"] = [by_layer.get(i, by_layer.get(str(i))) for i in range(depth)]
    return [{name: column[i] for name, column in columns.items() if i < len(column)} for i in range(depth)]


def _lists(fields: Fields, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if isinstance(fields.get(name), list)]


def permuted_config(
    config: PreTrainedConfig, slots: tuple[int, ...]
) -> tuple[PreTrainedConfig, dict[str, tuple[Any, Any]]]:
    """The config of a stock model whose slot s is base layer `slots[s]`, and {field: (old, new)} of what changed.

    `config` is the text config of the base. Raises W206 when no value of a field can describe the slots.
    """
    depth = depth_of(config)
    assert depth is not None  # the stack was found by it
    old = copy.deepcopy(config.to_dict())
    new: Fields = dict.fromkeys(depth_fields(config), len(slots))
    for name in PER_LAYER:
        value = old.get(name)
        if isinstance(value, list) and len(value) == depth:
            new[name] = [value[i] for i in slots]
    for name in INDEX_LISTS:
        value = old.get(name)
        if isinstance(value, list):
            new[name] = [slot for slot, i in enumerate(slots) if i in value]
    for rule in RULES:
        if all(old.get(name) is not None for name in rule.fields):
            new |= _solve(rule, old, depth, slots)
    if isinstance(old.get("per_layer_config"), dict):
        by_layer = {int(i): value for i, value in old["per_layer_config"].items()}
        new["per_layer_config"] = {slot: by_layer[i] for slot, i in enumerate(slots) if i in by_layer}
    derived = {name for name in new if getattr(getattr(type(config), name, None), "fset", ...) is None}
    fields = {name: value for name, value in new.items() if name not in derived}
    made = copy.deepcopy(config)  # not by way of to_dict, which loses values such as infinity
    for name, value in fields.items():
        setattr(made, name, value)
    return made, {name: (old.get(name), value) for name, value in fields.items() if old.get(name) != value}


def _solve(rule: Rule, old: Fields, depth: int, slots: tuple[int, ...]) -> Fields:
    had = rule.property({name: old[name] for name in rule.fields}, depth)
    wanted = [had[i] for i in slots]
    here = {name: old[name] for name in rule.fields}
    for fields in (here, *rule.candidates(here, wanted)):
        if rule.property(fields, len(slots))[: len(slots)] == wanted and len(rule.property(fields, len(slots))) == len(
            slots
        ):
            return fields
    flags = "".join("x" if w else "." for w in wanted)
    raise WriteError(
        f"no value of {' and '.join(rule.fields)} gives the layers {_short(slots)} the property they had ({flags}); "
        "keep them in an order that the family can describe, or run the plan live",
        code="W206",
    )


def _short(slots: tuple[int, ...]) -> str:
    text = ",".join(map(str, slots))
    return text if len(text) < 60 else text[:57] + "..."
