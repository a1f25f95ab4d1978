"""A policy in a file of your own: the first columns run every layer, generated tokens after them every other one.

    shoal generate MODEL "Once" --policy examples/warm_up.py:tokens=8

A policy puts gates (or exits) into the plan and decides at each of them, for all tokens or token by token. One that
goes by the column alone is a `Schedule`; `docs/dynamic.md` tells of the others.
"""

from __future__ import annotations

from shoal.deciding.gating import fill_for, with_gates
from shoal.deciding.policy import Policy, Schedule
from shoal.plan import Plan, Spec


def warm_up(plan: Plan, spec: Spec, *, tokens: int = 16, every: int = 2) -> Policy:
    """Skip every `every`-th layer, but never the first, from column `tokens` on; prompts run whole."""
    skipped = plan.layers()[1::every]
    policy = _WarmUp(plan, tokens, frozenset(skipped))
    policy.plan = with_gates(plan, spec, skipped, "warm-up", fill_for(policy, "auto"))
    return policy


class _WarmUp(Schedule):
    def __init__(self, plan: Plan, tokens: int, left_out: frozenset[int]) -> None:
        super().__init__(plan)
        self.tokens, self.left_out = tokens, left_out

    def skipped(self, column: int, generated: bool) -> frozenset[int]:
        return self.left_out if generated and column >= self.tokens else frozenset()
