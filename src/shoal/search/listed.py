"""Listed: remove exactly the layers that the user names."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.plan import Plan, drop as drop_layers
from shoal.scores import Found, Legal


def listed(plan: Plan, *, layers: tuple[int, ...], legal: Legal, stack: str | None = None) -> Found:
    """Remove these layers (base indices, 0-based). Raises P103 for one that does not run, U506 when the rest is not legal."""
    smaller = drop_layers(plan, layers, stack=stack)
    if not legal(smaller):
        raise UsageError(f"without the layers {list(layers)} the plan is not legal; name others", code="U506")
    return Found(smaller)
