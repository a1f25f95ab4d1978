"""What llama.cpp makes of a layer's place, architecture by architecture: data, read from its sources.

Read in `src/models/*.cpp` and `src/llama-model.cpp` of the llama.cpp that llama-cpp-python 0.3.36 carries. An
architecture that stands nowhere here is refused, since a layer in another place could be another layer.
"""

from __future__ import annotations

UNIFORM = frozenset(
    (
        "apertus", "arcee", "bloom", "codeshell", "deci", "dream", "exaone", "falcon", "gemma", "gpt2", "gptneox",
        "granite", "internlm2", "llama", "mpt", "nemotron", "olmo", "olmoe", "openelm", "orion", "phi2", "qwen",
        "qwen2", "qwen2moe", "qwen3", "qwen3moe", "refact", "seed_oss", "stablelm", "starcoder", "starcoder2", "xverse",
    )
)  # fmt: skip
"""Every layer is made from its own tensors and its own entry in the metadata alone."""

WINDOWS = {"cohere2": 4, "gemma2": 2, "gemma3": 6, "olmo2": 4}
"""Sliding windows: where `attention.sliding_window_pattern` is no array, the last of every n layers is full (`n` is
that key's number, else this one). An array says it layer by layer."""

SCALED = {"gemma2": 46, "gemma3": 62}
"""A model of exactly this depth is taken for the one whose attention is scaled by hidden size over heads."""

WHOLE = frozenset(("rope.dimension_sections", "classifier.output_labels", "target_layers"))
"""Arrays of an architecture that never hold one entry per layer, whatever their length."""

COUNTED = (
    "leading_dense_block_count", "nextn_predict_layers", "interleave_moe_layer_step", "full_attention_interval",
    "moe_every_n_layers", "attention.shared_kv_layers", "n_deepstack_layers", "decoder_block_count",
    "rescale_every_n_layers", "hash_layer_count",
)  # fmt: skip
"""Numbers that give layers another kind by their place."""

FAMILIES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gemma3": "gemma3_text", "gptneox": "gpt_neox"}
"""What transformers calls an architecture whose name differs."""
