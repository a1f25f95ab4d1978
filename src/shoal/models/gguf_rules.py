"""What llama.cpp makes of a layer's place and which tensors it needs, by architecture: data, read from its sources.

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

PER_LAYER = frozenset(
    (
        "feed_forward_length", "attention.head_count", "attention.head_count_kv", "attention.sliding_window_pattern",
        "activation_sparsity_scale", "swiglu_clamp_exp", "swiglu_clamp_shexp",
    )
)  # fmt: skip
"""Keys of an architecture that are one number or a list with one entry per layer; another length does not load."""

LISTS_OF_ANY = ("xielu.",)
"""What keys begin with that hold one entry per layer and are not called after their architecture (Apertus)."""

ALIKE = (UNIFORM | WINDOWS.keys()) - {"deci"}
"""Every layer has tensors of the same names."""

OUTSIDE = ("token_embd.weight", "output_norm.weight")
"""Tensors beside the layers that every architecture of `ALIKE` needs."""

_DENSE = (
    "attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight", "ffn_norm.weight",
    "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight",
)  # fmt: skip
_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
_POST = ("post_attention_norm.weight", "post_ffw_norm.weight")
NEEDED: dict[str, tuple[str, ...]] = {
    "llama": _DENSE,
    "qwen2": (*_DENSE, "attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "qwen3": (*_DENSE, *_NORMS),
    "gemma2": (*_DENSE, *_POST),
    "gemma3": (*_DENSE, *_NORMS, *_POST),
}
"""The tensors of a layer of a dense model. A file with experts (`expert_count`) has others."""

SHAPES = {
    "attn_norm": ("hidden",), "ffn_norm": ("hidden",), "attn_q": ("hidden", "q"), "attn_k": ("hidden", "k"),
    "attn_v": ("hidden", "v"), "attn_output": ("o", "hidden"), "ffn_gate": ("hidden", "mlp"),
    "ffn_up": ("hidden", "mlp"), "ffn_down": ("mlp", "hidden"), "post_attention_norm": ("hidden",),
    "post_ffw_norm": ("hidden",),
}  # fmt: skip
"""The shapes of a dense layer's matrices and norms, as the file counts: inputs first."""

UNUSED = ("attn_rot_embd.weight",)
"""Tensors of old files that llama.cpp and transformers both leave aside."""

INSTEAD = {f"attn_{part}.weight": ("attn_qkv.weight",) for part in "qkv"}
"""Names under which llama.cpp also takes a needed tensor."""
