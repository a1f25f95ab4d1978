"""Qwen4 experimental: rows of the cache hold positions that the model reads by the layer's own index."""

from shoal.models.families import Family

FAMILY = Family(
    types=("qwen4_exp", "qwen4_exp_text"),
    refused="its model reads the positions of certain rows of the KV cache itself",
)
