"""Listed: remove exactly the layers that the user names."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.plan import Plan
from shoal.plan import drop as drop_layers
from shoal.scores import Found, Legal


def listed(plan: Plan, *, layers: tuple[int, ...], legal: Legal, stack: str | None = None) -> Found:
    """Remove exactly these layers (base indices, 0-based).

    Source: none; the layers are the user's.

    Raises P103 for a layer that does not run, P104 when none would be left, U506 when the rest is not legal.
    """
    smaller = drop_layers(plan, layers, stack=stack)
    if not legal(smaller):
        raise UsageError(
            f"without the layers {list(layers)} the plan is not legal; name others, or allow plans that only run live",
            code="U506",
        )
    return Found(smaller)
