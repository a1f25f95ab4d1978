"""Reformer: reversible layers that hand on two streams, from one function that calls them all."""

from shoal.models.families import Family

FAMILY = Family(types=("reformer",), refused="its layers are reversible and hand on two streams")
