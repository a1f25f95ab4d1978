"""What tiny models that read pictures and text need besides the small sizes of `SMALL`; data only."""

from __future__ import annotations

from typing import Any

TOWER: dict[str, Any] = {
    "depth": 2, "num_hidden_layers": 2, "embed_dim": 32, "out_hidden_size": 32, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1], "global_attn_indexes": [1], "window_size": 56,
    "mlp_dim": 64, "output_channels": 32, "text_hidden_size": 32, "num_image_tokens": 4, "base_channels": 32,
    "latent_channels": 32, "num_embeddings": 64, "num_patches": 4, "image_token_embed_dim": 32,
    "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8, "vocab_size": 64,
    "mm_tokens_per_image": 4, "vision_output_dim": 32,
}  # fmt: skip
"""Small sizes of what is no language model, by the name of a field."""

MROPE: dict[str, Any] = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
}
LATENT: dict[str, Any] = {"text_config": {"num_key_value_heads": 4}}
ONE_TILE: dict[str, Any] = {"image_grid_pinpoints": [[28, 28]]}
PICTURE_OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v", "glmga", "glm_ocr", "paddleocr_vl"),
        MROPE,
    ),
    "glm4v_moe": {"text_config": {**MROPE["text_config"], "head_dim": 16}},
    "hunyuan_vl": MROPE,
    **dict.fromkeys(("kimi_k25", "glm5_next"), LATENT),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), ONE_TILE),
    "granite4_vision": ONE_TILE
    | {
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
        "deepstack_layer_map": [[-1, 1], [-2, 2]],
        "spatial_target_layers": [4, 5],
    },
    "ernie4_5_vl_moe": {"text_config": {**MROPE["text_config"], "moe_intermediate_size": [16, 16]}},
    "gemma3": {"mm_tokens_per_image": 4},
    "llama4": {
        "vision_config": {
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
            "intermediate_size": 128,
        }
    },
    "mistral3": {"vision_config": {"image_size": 56}},
    "mistral_large4": LATENT | {"vision_config": {"image_size": 56}},
    "molmo2": {"vision_config": {"image_size": [28, 28]}, "adapter_config": {"vision_feature_layer": [1, 0]}},
    "vipllava": {"vision_feature_layers": [-1, -2]},
}
"""By model type, where names alone do not make a sound small config."""

PATCHES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr",
    "minimax_m3_vl", "exaone4_5", "hyperclovax_vision_v2", "ernie4_5_vl_moe", "cosmos3_omni",
)  # fmt: skip
PICTURES: dict[str, str] = {
    **dict.fromkeys(PATCHES, "patches"),
    "kimi_k25": "crops",
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), "list"),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision", "granite4_vision"), "tiles"),
    **dict.fromkeys(("mistral3", "mistral_large4", "lighton_ocr"), "sized"),
}
"""How a type is given a picture, where not as one tensor [1, channels, height, width]; see `picture_models.py`."""
