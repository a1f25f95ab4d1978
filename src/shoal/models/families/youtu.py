"""Youtu: its `_init_weights` zeroes the padding row on every load, so a rewritten model, which shares tensors with the
base, would change the base. Cloning what `_init_weights` can reach would lift this."""

from shoal.models.families import Family

FAMILY = Family(
    types=("youtu",), refused="its class zeroes a padding row of the weights whenever a model is made of them"
)
