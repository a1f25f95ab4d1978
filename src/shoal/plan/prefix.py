"""What plans have in common from the first step on, and where they part."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.plan.later import reads_later
from shoal.plan.plan import Plan
from shoal.plan.schedule import schedule
from shoal.plan.select import exits
from shoal.plan.steps import Step, runs

Prefix = tuple[int, tuple[Step, ...]]
"""A cut, as the base layer at whose proxy call the state is read, and the steps that ran before it."""


def prefixes(plan: Plan, stack: str | None = None) -> dict[int, Prefix]:
    """Cut -> prefix, for each cut behind which no step reads what a layer before it left (KV, or arguments). None in a
    plan with later sources, where every state depends on what runs behind it, and where a head may read earlier states.
    """
    steps, depth = plan.steps(stack), plan.depth(stack)
    if reads_later(steps) or any(step.head != "base" for step in exits(steps)):
        return {}
    due, _ = schedule(steps, depth)
    found: dict[int, Prefix] = {}
    needs = depth
    for cut in reversed(range(1, depth)):
        for run in runs(tuple(step for _, step in due[cut])):
            needs = min(needs, run.layer, *(source.layer for source in run.layer_sources))
        if needs >= cut:
            found[cut] = (cut, tuple(step for together in due[:cut] for _, step in together))
    return found


def shared(plans: Iterable[Plan], stack: str | None = None) -> set[Prefix]:
    """The prefixes at which two or more of `plans` part: for each plan, the longest one that another has as well."""
    own = [prefixes(plan, stack) for plan in plans]
    seen: dict[Prefix, int] = {}
    for found in own:
        for prefix in found.values():
            seen[prefix] = seen.get(prefix, 0) + 1
    longest = ((prefix for _, prefix in sorted(found.items(), reverse=True) if seen[prefix] > 1) for found in own)
    return {prefix for prefix in (next(ours, None) for ours in longest) if prefix is not None}
