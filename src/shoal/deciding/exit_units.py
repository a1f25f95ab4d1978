"""Probes and halting units of exits: whether a plan's tensors have those that a policy reads."""

from __future__ import annotations

from shoal.errors import UsageError
from shoal.executing.weights import Tensors
from shoal.plan import Plan
from shoal.plan.select import exits


def has_probes(plan: Plan, weights: Tensors) -> bool:
    """Whether every exit of `plan` has a probe."""
    heads = {step.head for step in exits(plan.steps())}
    return bool(heads) and all(_has_unit(head, "probe", weights) for head in heads)


def _has_unit(head: str, name: str, weights: Tensors) -> bool:
    return f"{head}.{name}" in weights and f"{head}.{name}_bias" in weights


def require_units(plan: Plan, weights: Tensors, by: str) -> None:
    """Raise U623 for by=probe at exits without one, U684 for heads without the halting unit that a policy reads."""
    heads = {step.head for step in exits(plan.steps())} - {"base"}
    if by == "halting" and (without := sorted(head for head in heads if not _has_unit(head, by, weights))):
        raise UsageError(
            f"{without[0]} has no halting unit: {without[0]}.halting and {without[0]}.halting_bias are not among the "
            "plan's tensors; give them, or an exit without a head",
            code="U684",
        )
    if by == "probe" and not has_probes(plan, weights):
        raise UsageError(
            "by=probe reads a probe at every exit, and this plan has none; fit them with shoal fit-exits, and give "
            "the plan that it writes",
            code="U623",
        )
