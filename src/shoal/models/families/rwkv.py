"""RWKV keeps its state in plain tensors, outside any cache that could hold another row."""

from shoal.models.families import Family

FAMILY = Family(types=("rwkv",), once="a layer's recurrent state has one place only")
