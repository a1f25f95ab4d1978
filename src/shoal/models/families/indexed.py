"""Families with a sparse attention whose layers can take over the chosen tokens of the layer before."""

from shoal.models.families import Family

FAMILY = Family(types=("glm_moe_dsa", "glm5_next", "hy_v4"), takes_over=("indexer_types", "shared"))
