"""HRM: the model's own forward runs its two stacks in cycles."""

from shoal.models.families import Family

FAMILY = Family(types=("hrm_text",), refused="its own forward already repeats two stacks in cycles")
