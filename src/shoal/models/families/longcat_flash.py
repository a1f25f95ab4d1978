"""LongCat Flash: an entry of the list of layers is two layers with two rows of the cache."""

from shoal.models.families import Family

FAMILY = Family(types=("longcat_flash",), refused="each entry of its list is two layers with two rows of the KV cache")
