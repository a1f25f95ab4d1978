"""What two plans do differently, layer by layer; nothing is left out and nothing is made up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from shoal.errors import PlanError
from shoal.plan import Change, Plan, Step, diff, parse_steps
from unit import strategies
from unit.specs import alternating, llama, plan_of, two_stacks


def _diff(before: str, after: str) -> list[tuple[int, str, str]]:
    changes = diff(plan_of(before), plan_of(after))
    assert {change.stack for change in changes} <= {"decoder"}
    return [(change.layer, change.before, change.after) for change in changes]


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ("0-7", "0-7", []),
        ("0-7", "0-2,5-7", [(3, "3", "-"), (4, "4", "-")]),
        ("0-2,5-7", "0-7", [(3, "-", "3"), (4, "-", "4")]),
        ("0-2", "0,1a,2x2", [(1, "1", "1a"), (2, "2", "2 + 2")]),
        ("0-2", "0,1@0,2?g/copy", [(1, "1", "1@0"), (2, "2", "2?g/copy")]),
        ("0-3", "0,~1-2,3", [(1, "1", "~1-2"), (2, "2", "~1-2")]),
        ("0-3", "0,(1|2),3", [(1, "1", "(1|2)"), (2, "2", "(1|2)")]),
        ("0,1a,1m,2", "0,1,2", [(1, "1a + 1m", "1")]),
        ("0-3", "3-0", [(-1, "0-3", "3-0")]),
        ("0-3", "0,1x2,3,2", [(1, "1", "1 + 1"), (-1, "0-3", "0,1x2,3-2")]),
        ("0,1,~5-6,2", "0,~5-6,1,2", [(-1, "0-1,~5-6,2", "0,~5-6,1-2")]),
        ("0-3", "0-1,!e?g,2-3", [(-1, "0-3", "0-1,!e?g,2-3")]),
        ("0,!e?g,1", "0,!e=h?g,1", [(-1, "0,!e?g,1", "0,!e=h?g,1")]),
        ("0-1,!e?g,2-3", "0-1,!e?g,3", [(2, "2", "-")]),
    ],
)
def test_changes_are_told_by_base_layer(before: str, after: str, changes: list[tuple[int, str, str]]) -> None:
    assert _diff(before, after) == changes


def test_changes_name_their_stack() -> None:
    model = two_stacks()
    assert diff(Plan.identity(model), plan_of("encoder: 0-2; decoder: 0,2-5", model)) == [
        Change("encoder", 3, "3", "-"),
        Change("decoder", 1, "1", "-"),
    ]


@settings(max_examples=80)
@given(strategies.steps(3), strategies.steps(3))
def test_equal_plans_and_only_they_have_no_changes(one: tuple[Step, ...], other: tuple[Step, ...]) -> None:
    whole = Plan.identity(llama())
    before, after = whole.with_steps(one), whole.with_steps(other)
    assert diff(before, before) == []
    assert (diff(before, after) == []) == (before == after)
    assert [(c.stack, c.layer, c.after, c.before) for c in diff(before, after)] == [
        (c.stack, c.layer, c.before, c.after) for c in diff(after, before)
    ]


def test_plans_of_two_models_are_not_compared() -> None:
    with pytest.raises(
        PlanError, match=r"P101: .*llama, sha256:\w+ and gemma2, sha256:\w+\); compare plans of one model"
    ):
        diff(Plan.identity(llama()), Plan.identity(alternating()))


def test_where_a_model_came_from_is_no_difference() -> None:
    plan = Plan.identity(llama())
    assert diff(plan, replace(plan, base=replace(plan.base, source="elsewhere"))) == []
    assert parse_steps("0-7") == plan.steps()
