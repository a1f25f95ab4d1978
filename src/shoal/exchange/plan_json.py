"""Shoal's own plan.json."""

from __future__ import annotations

from shoal.errors import NotationError
from shoal.examples import FormatExamples
from shoal.exchange._format import Format
from shoal.plan import Plan, Spec, plan_from_json, plan_to_json

NAME = "plan-json"
EXAMPLES = FormatExamples(says="everything")


def plan_json() -> Format:
    """Shoal's own plan file, base layers counted from 0, both ends of a range included.

    Source: shoal-plan/1, see docs/plans.md.

    Says: everything.
    """
    return Format(_read, _write)


def _read(text: str | bytes, identity: Plan) -> Plan:
    plan = plan_from_json(text)
    if plan.base != identity.base:
        raise NotationError(
            f"this plan.json was made for another model ({plan.base.family!r:.60}, {plan.base.fingerprint!r:.20}); "
            f"give its own model",
            code="N106",
        )
    return plan


def _write(plan: Plan, spec: Spec | None = None) -> str:
    return plan_to_json(plan)
