"""From the text of a policy to the policy, made for one plan and one model."""

from __future__ import annotations

from shoal.deciding.gating import ungated
from shoal.deciding.policy import Policy
from shoal.deciding.policy_file import LearnedPolicy, load_policy
from shoal.errors import NotationError, PlanError, UsageError
from shoal.executing.weights import Tensors, hash_of_used
from shoal.plan import Plan, Spec, format_steps
from shoal.spelling import chosen


def make_policy(text: str, plan: Plan, spec: Spec) -> Policy:
    """NAME or NAME:key=value,key=value, as in `exit:confidence=0.9` or `skip:listed=3-5,7`, for this plan and model; or
    the policy.json of `shoal calibrate` or `shoal heal`.

    Raises U501 for a name and U502 for an option that does not exist, and what the policy itself raises.
    """
    if text.endswith(".json") and ":" not in text:
        read = _learned_in(text)
        if read is not None:
            read.require(plan, text)
            learned = make_policy(read.text, plan, spec)
            learned.tensors = read.weights
            return learned
        text = f"calibrated:file={text}"
    entry, options = chosen("policies", text)
    made: Policy = entry.load()(plan, spec, **options)
    return made


def _learned_in(file: str) -> LearnedPolicy | None:
    """What `shoal heal` wrote there; None for anything else, which `calibrated` reads, or refuses."""
    try:
        read = load_policy(file)
    except NotationError:
        return None
    return read if isinstance(read, LearnedPolicy) else None


def policy_for(policy: Policy | str, plan: Plan, spec: Spec) -> Policy:
    """The policy itself, held to the plan that runs. Raises P138 when it was made for another one."""
    if isinstance(policy, str):
        return make_policy(policy, plan, spec)
    if policy.plan != plan and ungated(policy.plan) != plan:
        raise PlanError(
            f"this policy was made for the plan {format_steps(ungated(policy.plan).steps())} of "
            f"{policy.plan.base.family}, not for {plan}; make it for the plan that runs",
            code="P138",
        )
    return policy


def require_tensors(policy: Policy, weights: Tensors | None) -> None:
    """Raise U605 when the policy was made with other tensors, so that its promise does not hold for these."""
    if policy.tensors not in (None, hash_of_used(policy.plan, weights)):
        raise UsageError(
            "this policy was made with other lenses, heads or gates than the plan has now; run shoal calibrate, or "
            "shoal heal, with this plan",
            code="U605",
        )
