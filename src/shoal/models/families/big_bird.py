"""BigBird seeds its random attention with the position; the seed is used in training alone."""

from shoal.models.families import Family

FAMILY = Family(types=("big_bird",), numbering=("seed",))
