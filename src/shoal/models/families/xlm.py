"""XLM keeps no layers: their halves and norms are in four lists."""

from shoal.models.families import Family

FAMILY = Family(types=("xlm", "flaubert"), refused="its layers are spread over four lists")
