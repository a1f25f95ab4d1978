"""Small sizes by the name of a field, and what single types need besides; data only."""

from __future__ import annotations

from typing import Any

DEPTH, VOCAB = 6, 64

SMALL: dict[str, Any] = {
    # widths
    "vocab_size": VOCAB, "hidden_size": 32, "d_model": 32, "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64,
    "n_inner": 64, "word_embed_proj_dim": 32, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64, "intermediate_size_mlp": 64,
    "embedding_size": 32, "dim_ff": 64, "ffn_hidden_size": 64, "dense_intermediate_size": 64,
    "shared_intermediate_size": 16,
    # depth
    "num_hidden_layers": DEPTH, "num_layers": DEPTH, "n_layer": DEPTH, "decoder_layers": DEPTH, "encoder_layers": 2,
    "num_encoder_layers": 2, "num_decoder_layers": DEPTH,
    # attention
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_heads": 4, "head_dim": 8, "global_head_dim": 8, "attention_head_dim": 8,
    "query_pre_attn_scalar": 8, "sliding_window": 6, "local_attention": 6, "attention_chunk_size": 6, "window_size": 6,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "rotary_dim": 4, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4,
    # positions and tokens
    "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128, "context_length": 128, "max_seq_len": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4,
    "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    # recurrent layers
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4, "mamba_chunk_size": 4, "mamba_dt_rank": 4,
    "mamba_d_ssm": 64, "use_mamba_kernels": False, "lru_width": 32, "attention_window_size": 6,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    # towers
    "image_size": 28, "patch_size": 14, "projection_dim": 32, "encoder_hidden_dim": 32,
    # the rest
    "is_decoder": True, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4,
}  # fmt: skip
"""By the family's own name of the field, or by the name that transformers maps to it."""

LATENT: dict[str, Any] = {"num_key_value_heads": 4}
"""Latent attention has as many key heads as query heads."""

SLIDING_FULL = ["sliding_attention", "full_attention"] * 3
DOTS3: dict[str, Any] = LATENT | {"head_dim": 16, "layer_types": ["indexed_attention"] * DEPTH}
HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"] * 3}
INDEXED: dict[str, Any] = {"indexer_types": ["full", "shared", "full", "full", "shared", "full"]}
ZAMBA: dict[str, Any] = {
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention", "hybrid"]
}
GEMMA4: dict[str, Any] = {"global_head_dim": 16, "layer_types": SLIDING_FULL}
QWEN4: dict[str, Any] = {
    "layer_types": ["linear_attention", "indexed_attention"] * 3, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2, "hc_lowrank": 8, "ple_embed_dim": 32,
    "ngram_vocab_size_base": 64, "split_ngram_parts": 2,
}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
            "kimi_linear", "longcat_flash", "minicpm3", "youtu",
        ),
        LATENT,
    ),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), HYBRID),
    "qwen3_5": {"text_config": HYBRID},
    "qwen3_5_moe": {"text_config": HYBRID},
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), GEMMA4),
    "gemma4": {"text_config": GEMMA4},
    "gemma4_unified": {"text_config": GEMMA4},
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {
        "attn_config": {"model_type": ..., "rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"model_type": ..., "hidden_size": 32, "ffn_hidden_size": 16},
    },
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense"] * 2},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": DOTS3,
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": SLIDING_FULL,
        "intermediate_size": [64] * DEPTH,
        "activation_sparsity_pattern": [0.0] * DEPTH,
    },
    "glm_moe_dsa": LATENT | INDEXED,
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": HYBRID,
    "hy_v4": INDEXED,
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention", "moe", "mlp"],
        "moe_shared_expert_intermediate_size": 16,
    },
    "prophetnet": {"num_encoder_layers": DEPTH},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {
        "axial_pos_embds": False, "attention_head_size": 8, "feed_forward_size": 64,
        "attn_layers": ["local", "lsh"] * 3,
        "num_buckets": 4, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "use_cache": False,
    },
    "xlstm": {"hidden_size": 128},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""By model type, where names alone do not make a sound small config."""

_ALL_SHARED = "its config must let every layer share KV, and its text model accepts no such config"
_DECODER = (
    "AutoModelForCausalLM hands the whole config to a class that needs the decoder's; only the latter can be built"
)
UNBUILT = {
    "gemma3n": "its vision tower comes from timm, which is not among our dependencies; gemma3n_text is surveyed",
    "gemma4_assistant": _ALL_SHARED,
    "gemma4_unified_assistant": _ALL_SHARED,
    "musicgen": _DECODER,
    "musicgen_melody": _DECODER,
}
"""Why transformers builds no model of a type, in words, beside what it says itself."""
