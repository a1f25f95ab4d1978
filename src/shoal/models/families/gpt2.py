"""GPT-2 and its relatives can scale attention by 1 / (layer index + 1)."""

from shoal.models.families import Family

FAMILY = Family(
    types=("gpt2", "decision_transformer", "imagegpt"),
    position_numbers="scale_attn_by_inverse_layer_idx",
)
