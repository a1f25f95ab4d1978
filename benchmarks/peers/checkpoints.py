"""The checkpoints: 8 layers, tiny, random, of families whose config says something for each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DROPPED = (1, 4)
"""Layers, from 0."""
LAYERS = 8
VOCAB = 64

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3": ("qwen3", {"head_dim": 8}),
    "Gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "SmolLM3": ("smollm3", {}),
    "Qwen2-MoE": (
        "qwen2_moe",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2, "mlp_only_layers": [5],
        },
    ),
    "Qwen3-MoE": (
        "qwen3_moe",
        {
            "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "decoder_sparse_step": 1, "mlp_only_layers": [2, 6],
        },
    ),
    "Llama-4": (
        "llama4_text",
        {
            "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 4, "interleave_moe_layer_step": 2,
            "attention_chunk_size": 6,
        },
    ),
}  # fmt: skip
FIELDS = ("layer_types", "no_rope_layers", "moe_layers", "mlp_only_layers", "decoder_sparse_step")


def make(family: str, folder: Path) -> dict[str, Any]:
    """Write the checkpoint of `family` and return what its config says of single layers.

    The weights are large enough that every layer matters, and differ from layer to layer.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, own = FAMILIES[family]
    shared = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **shared, **own)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
    model.tie_weights()
    model.save_pretrained(folder)
    facts = config.to_dict()
    return {field: facts[field] for field in FIELDS if facts.get(field) not in (None, [], ["full_attention"] * LAYERS)}


def kept() -> list[int]:
    return [layer for layer in range(LAYERS) if layer not in DROPPED]


def ranges() -> list[list[int]]:
    """The kept layers as ranges without their ends."""
    found: list[list[int]] = []
    for layer in kept():
        if found and found[-1][1] == layer:
            found[-1][1] = layer + 1
        else:
            found.append([layer, layer + 1])
    return found
