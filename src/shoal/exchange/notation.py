"""Shoal's depth notation, as in `0-11,14-29`."""

from __future__ import annotations

from shoal.examples import FormatExamples
from shoal.exchange._format import Format, decoded
from shoal.plan import Plan, Spec, format_plan, parse_plan

NAME = "notation"
EXAMPLES = FormatExamples(says="everything")


def notation() -> Format:
    """Depth notation as a person types it, base layers counted from 0, both ends of a range included.

    Source: docs/plans.md.

    Says: everything.
    """
    return Format(_read, _write)


def _read(text: str | bytes, identity: Plan) -> Plan:
    return parse_plan(decoded(text, NAME), identity)


def _write(plan: Plan, spec: Spec | None = None) -> str:
    return format_plan(plan) + "\n"
