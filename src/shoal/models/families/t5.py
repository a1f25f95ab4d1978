"""T5 and its like compute the relative position bias in the first layer, whose weights hold it, and hand it on."""

from shoal.models.families import Family

FAMILY = Family(
    types=("t5", "mt5", "longt5", "switch_transformers", "pop2piano", "udop"),
    first_owns="relative_attention_bias",
)
