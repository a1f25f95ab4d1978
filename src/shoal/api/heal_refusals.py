"""What `heal` refuses before anything is read: models, stacks, and plans that a recipe has nothing to say to."""

from __future__ import annotations

from importlib import import_module

from shoal.deciding.policy import Policy
from shoal.deciding.policy_text import make_policy
from shoal.errors import ModelError, UsageError
from shoal.healing.stage import Recipe, Stage, term_of
from shoal.models.adapter import is_adapted
from shoal.models.load import Loaded
from shoal.models.placed import is_placed
from shoal.plan import Plan, Spec
from shoal.plan.steps import decides, runs


def require_bare(loaded: Loaded) -> None:
    """Raise U644 for a model with adapters, U737 for one that is spread or left in files, W212 for a quantised one."""
    if is_placed(loaded.model):
        raise UsageError(
            f"healing trains {loaded.source} in the memory of its devices, and --device-map or --stream keeps a part "
            "of it elsewhere; start it by accelerate launch --use_fsdp, or heal layer by layer: shoal fuse --with "
            "refit, or --with streamline:kind=layer, which take --stream",
            code="U737",
        )
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


def require_told(stages: Recipe, plan: Plan, stack: str, spec: Spec) -> None:
    """Raise U721 for gates about which nobody decides, U722 for a policy of gates beside exits, where it puts none, and
    what terms raise of a plan that they cannot read."""
    trained = [stage for stage in stages if isinstance(stage, Stage)]
    gated = next((run for run in runs(plan.steps(stack)) if run.gate is not None), None)
    policy = trained[0].policy if trained else ""
    if gated is not None and not policy:
        raise UsageError(
            f"layer {gated.layer} stands behind the gate {gated.gate}, and this recipe has nobody who decides there; "
            "take one with a policy (shoal ls recipes), or the plan without gates",
            code="U721",
        )
    if policy and gated is None and decides(plan.steps(stack)):
        leaves = type(make_policy(policy, plan, spec)).should_exit is not Policy.should_exit
        if not leaves:
            raise UsageError(
                f"the policy {policy} of this recipe puts its gates into a plan that has neither gates nor exits, and "
                f"{plan} has exits; give it without them",
                code="U722",
            )
    for term in (term_of(text) for stage in trained if not stage.policy for text in stage.terms):
        check = getattr(import_module(term.entry.module), "CHECK_PLAN", None)
        if check is not None:
            check(plan, stack, **term.options)
