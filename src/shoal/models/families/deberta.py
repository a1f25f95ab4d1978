"""DeBERTa v2 runs a convolution over the embeddings beside its first layer, and adds it behind that layer."""

from shoal.models.families import Family

FAMILY = Family(
    types=("deberta-v2",), pinned="a convolution over its input is added behind it", pinned_if="conv_kernel_size"
)
