"""BLT: four stacks, and the bytes of one are the patches of another."""

from shoal.models.families import Family

FAMILY = Family(types=("blt",), refused="it is four models, and where patches begin depends on one of them")
