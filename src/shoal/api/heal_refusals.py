"""What `heal` refuses before anything is read: models, stacks, and plans that a recipe has nothing to say to."""

from __future__ import annotations

from importlib import import_module

from shoal.errors import ModelError, UsageError
from shoal.healing.stage import Recipe, Stage, term_of
from shoal.models.adapter import is_adapted
from shoal.models.load import Loaded
from shoal.plan import Plan
from shoal.plan.steps import runs


def require_bare(loaded: Loaded) -> None:
    """Raise U644 for a model with adapters, W212 for a quantised one."""
    if is_adapted(loaded.model):
        raise UsageError(
            f"{loaded.source} has an adapter in its modules, and healing puts its own there; merge it first "
            "(merge_and_unload)",
            code="U644",
        )
    if getattr(loaded.model, "hf_quantizer", None) is not None:
        raise ModelError("the model is quantised; load it dequantised to heal it", code="W212")


def stack_of(plan: Plan, stack: str | None) -> str:
    """The stack that is healed. Raises U653 for a plan that changes several, without a name."""
    changed = plan.changed()
    if stack is None and len(changed) > 1:
        raise UsageError(
            f"the plan changes the stacks {' and '.join(changed)}, and one is healed; name it (--stack)", code="U653"
        )
    return plan.stack_name(stack if stack is not None or not changed else changed[0])


def require_told(stages: Recipe, plan: Plan, stack: str) -> None:
    """Raise U721 for gates about which nobody decides, and what terms raise of a plan that they cannot read."""
    trained = [stage for stage in stages if isinstance(stage, Stage)]
    if trained and not trained[0].policy and (run := next((r for r in runs(plan.steps(stack)) if r.gate), None)):
        raise UsageError(
            f"layer {run.layer} stands behind the gate {run.gate}, and this recipe has nobody who decides there; take "
            "one with a policy (shoal ls recipes), or the plan without gates",
            code="U721",
        )
    for term in (term_of(text) for stage in trained if not stage.policy for text in stage.terms):
        check = getattr(import_module(term.entry.module), "check_plan", None)
        if check is not None:
            check(plan, stack, **term.options)
