"""`block_configs` of nemotron-nas (DeciLM): for each layer, what its attention and its mlp are."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from shoal.errors import NotationError
from shoal.examples import FormatExamples
from shoal.exchange._drops import Drops, apply_drops, drops_of
from shoal.exchange._format import Format, from_json, shown
from shoal.plan import LayerSpec, Plan, Spec, StackSpec, require

NAME = "nemotron-nas"
LLAMA_LIKE = frozenset({"llama", "mistral", "nemotron-nas"})
"""Families whose layer is nemotron-nas's own when its sizes are (`_layer_sizes`)."""
SIZES = {"attention": "n_heads_in_group", "ffn": "ffn_mult"}
SAME = {
    "attention": ("n_heads_in_group", "num_key_value_heads"),
    "ffn": ("ffn_mult", "intermediate_size", "hidden_act", "gated"),
}
"""What the parts that run may say about themselves, if all say the same."""
ROUND = 256
"""nemotron-nas rounds 2/3 x ffn_mult x hidden up to a multiple of this."""
EXAMPLES = FormatExamples(says="removed parts")


def nemotron_nas() -> Format:
    """The config field block_configs, one entry for each layer of the base model, from 0.

    `no_op` leaves a part out; a whole config.json or the bare list is read.

    Source: the config of DeciLM / Llama-Nemotron checkpoints (Bercovich et al. 2024, arXiv 2411.19146), as read by
    vLLM's nemotron_nas.py at 00bd149, which takes newer configs with intermediate_size for ffn_mult too.

    Says: layers, attentions and mlps removed, of a Llama-like model. intermediate = ceil256(2/3 ffn_mult hidden).
    Refused when read: linear replacements, widths that differ between layers, windows and sinks (N103).
    """
    return Format(_read, _write)


def _read(text: str | bytes, identity: Plan) -> Plan:
    data = from_json(text, NAME)
    blocks = data.get("block_configs") if isinstance(data, dict) else data
    if not isinstance(blocks, list):
        raise NotationError(f"the {NAME} file has no list block_configs; give such a config.json", code="N101")
    if len(blocks) != identity.depth():
        raise NotationError(
            f"block_configs has {len(blocks)} entries, the model has {identity.depth()} layers; give one a layer",
            code="N106",
        )
    return apply_drops(identity, Drops(_removed(blocks, "attention"), _removed(blocks, "ffn")))


def _removed(blocks: list[Any], part: str) -> frozenset[int]:
    """Layers whose `part` is a no_op; the others must be alike."""
    gone: set[int] = set()
    size: dict[str, Any] | None = None
    for layer, block in enumerate(blocks):
        facts = block.get(part) if isinstance(block, dict) else None
        if not isinstance(facts, dict) or type(facts.get("no_op", False)) is not bool:
            raise NotationError(f"block_configs[{layer}] has no {part} with a true or false no_op; add it", code="N101")
        if facts.get("no_op"):
            gone.add(layer)
            continue
        for key, value in facts.items():
            if key not in ("no_op", *SAME[part]) and value:
                _refuse(f"{shown(key)} in the {part} of layer {layer}", f"a {part} without it")
        found = {key: facts.get(key) for key in SAME[part]}
        if size is not None and found != size:
            key = next(key for key in found if found[key] != size[key])
            what = f"{key} {shown(found[key])} in layer {layer} beside {shown(size[key])}"
            _refuse(what, "layers of one width; a plan changes the depth")
        size = found
    return frozenset(gone)


def _refuse(what: str, instead: str) -> NoReturn:
    raise NotationError(f"{NAME}: a plan cannot say {what}; write {instead}", code="N103")


def _write(plan: Plan, spec: Spec | None = None) -> str:
    drops = drops_of(plan, name=NAME)
    if spec is None:
        raise NotationError(f"{NAME} states sizes, which a plan does not know; give the model", code="N105")
    require(plan, spec)
    if plan.base.family not in LLAMA_LIKE:
        raise NotationError(
            f"{NAME} cannot say layers of {plan.base.family:.60}, it runs Llama's layer alone; "
            f"use llm-drop, or keep layers whole and write a folder",
            code="N104",
        )
    stack = spec.stack(plan.stack_name())
    lines = []
    for layer in stack.layers:
        group, mult = _layer_sizes(layer, stack)
        attention = _part("attention", group, layer.index in drops.attention)
        lines.append(json.dumps({"attention": attention, "ffn": _part("ffn", mult, layer.index in drops.mlp)}))
    return '{"block_configs": [\n ' + ",\n ".join(lines) + "\n]}\n"


def _part(part: str, size: float, gone: bool) -> dict[str, Any]:
    return {"no_op": gone, "replace_with_linear": False, SIZES[part]: None if gone else size}


def _layer_sizes(layer: LayerSpec, stack: StackSpec) -> tuple[int, float]:
    """(query heads for each KV head, ffn_mult). Raises N104 when the layer is not one that nemotron-nas can build."""
    kv, hidden = layer.kv, stack.hidden
    if layer.attention is None or layer.mlp is None or kv.kind != "full" or not kv.heads or kv.key_dim != kv.value_dim:
        _not_llama(layer, f"its kind is {layer.kind}, its KV {kv.kind}")
    heads, group = layer.width // (2 * kv.key_dim), layer.width // (2 * kv.key_dim * kv.heads)
    if heads * kv.key_dim != hidden or group * kv.heads != heads:
        _not_llama(layer, f"its {heads} heads of size {kv.key_dim} do not make up the width {hidden}")
    if layer.attention.params != 2 * hidden * (hidden + kv.heads * kv.key_dim):
        _not_llama(layer, "its attention has biases, norms or other weights beside Llama's four matrices")
    inner, rest = divmod(layer.mlp.params, 3 * hidden)
    if rest or inner % ROUND or not inner:
        _not_llama(layer, f"its mlp of {layer.mlp.params:,} parameters is no gated one with a multiple of {ROUND}")
    return group, 3 * inner / (2 * hidden)


def _not_llama(layer: LayerSpec, why: str) -> NoReturn:
    raise NotationError(
        f"{NAME} cannot say layer {layer.index}: {why}; use llm-drop, or keep layers whole and write a folder",
        code="N104",
    )
