"""Zamba 2: the shared block holds an adapter for each hybrid layer, by its place among them."""

from shoal.models.families import Family

FAMILY = Family(
    types=("zamba2",), in_order="the adapters in its shared block are counted by the place of each hybrid layer"
)
