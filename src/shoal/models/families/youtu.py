"""Youtu: written folders differed from the live plan in some runs of the survey; refused until the cause is known."""

from shoal.models.families import Family

FAMILY = Family(types=("youtu",), refused="its written checkpoints do not always compute what the plan computes")
