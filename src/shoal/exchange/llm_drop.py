"""LLM-Drop's two lists in `config.json`: `drop_attn_list` and `drop_mlp_list`."""

from __future__ import annotations

import json

from shoal.errors import NotationError
from shoal.examples import FormatExamples
from shoal.exchange._drops import Drops, apply_drops, drops_of
from shoal.exchange._format import Format, from_json, layer_numbers, shown
from shoal.plan import Plan, Spec

NAME = "llm-drop"
ATTENTION, MLP, DEPTH = "drop_attn_list", "drop_mlp_list", "num_hidden_layers"
EXAMPLES = FormatExamples(says="removed parts")


def llm_drop() -> Format:
    """The config fields drop_attn_list and drop_mlp_list, counted from 0.

    A whole config.json is read as well as the two fields alone; a layer in both lists is removed. A list may also hold
    true or false for each layer, as its config class saves it, or be null.

    Source: configuration_dropped_llama.py of github.com/CASE-Lab-UMD/LLM-Drop at 4d60422 (He et al. 2024, arXiv
    2406.15786).

    Says: layers, attentions and mlps removed.
    """
    return Format(_read, _write)


def _read(text: str | bytes, identity: Plan) -> Plan:
    data, depth = from_json(text, NAME), identity.depth()
    if not isinstance(data, dict) or not {ATTENTION, MLP} & set(data):
        raise NotationError(f"the {NAME} file has neither {ATTENTION} nor {MLP}; give such a config.json", code="N101")
    if data.get(DEPTH, depth) != depth:
        raise NotationError(
            f"the {NAME} file is for {shown(data[DEPTH])} layers, the model has {depth}; give its own model",
            code="N106",
        )
    attention, mlp = (
        layer_numbers(_numbers(data.get(field), field, depth), field, depth) for field in (ATTENTION, MLP)
    )
    return apply_drops(identity, Drops(attention, mlp))


def _numbers(found: object, field: str, depth: int) -> object:
    """The list of layers that a list of true and false means. Raises N101 when it is not one for each layer."""
    if found is None:
        return []
    if not isinstance(found, list) or not found or not all(type(entry) is bool for entry in found):
        return found
    if len(found) != depth:
        raise NotationError(
            f"{field} says true or false for {len(found)} layers, the model has {depth}; give its own model",
            code="N106",
        )
    return [layer for layer, gone in enumerate(found) if gone]


def _write(plan: Plan, spec: Spec | None = None) -> str:
    drops = drops_of(plan, name=NAME)
    return json.dumps({ATTENTION: sorted(drops.attention), MLP: sorted(drops.mlp)}) + "\n"
