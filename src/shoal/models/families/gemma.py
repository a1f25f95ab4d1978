"""Gemma 3n and 4 pack the per-layer embeddings of all layers into two tensors, and their last layers may share KV."""

from shoal.models.families import Family

FAMILY = Family(
    types=("gemma3n_text", "gemma4_text", "gemma4_unified_text"),
    sized_by_depth={"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0},
    shares_kv="num_kv_shared_layers",
    sharing_marks=("is_kv_shared_layer", "store_full_length_kv"),
)
