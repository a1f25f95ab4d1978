"""Scores and what searches share: order, plain data, and the budget."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from shoal.errors import UsageError
from shoal.plan import drop
from shoal.scores import Scores, removable, too_few

from .specs import plan_of

NAN = math.nan
SCORES = Scores(
    "fake", "decoder", "marks", (0.5, NAN, 0.1, 0.5, math.inf, 0.2, 0.3, 0.4), (None,) * 8, 1, 10, "nothing"
)


def test_the_lowest_goes_first_and_ties_go_to_the_lower_layer() -> None:
    assert SCORES.order() == (2, 5, 6, 7, 0, 3, 4)


def test_a_layer_that_was_not_judged_is_in_no_order() -> None:
    assert 1 not in SCORES.order()
    assert replace(SCORES, values=(NAN,) * 8).order() == ()


def test_scores_are_plain_json_whatever_their_values() -> None:
    data = json.loads(json.dumps(replace(SCORES, errors=(NAN, *(0.5,) * 7)).to_dict(), allow_nan=False))
    assert data["values"] == [0.5, None, 0.1, 0.5, None, 0.2, 0.3, 0.4]
    assert data["errors"] == [None, *[0.5] * 7]
    assert data["order"] == [2, 5, 6, 7, 0, 3, 4]


@pytest.mark.parametrize(
    ("changed", "spans", "message"),
    [
        ({"span": 3}, (1, 2), "judge spans of 3 layers, not of 1 or 2"),
        ({"stack": "encoder"}, (1,), "judge a stack 'encoder', not the 8 layers of 'decoder'"),
        ({"values": (0.1, 0.2)}, (1,), "these 2 scores"),
        ({"span": 2}, (2,), "these 8 scores"),
    ],
)
def test_scores_of_another_span_stack_or_model_are_refused(
    changed: dict[str, object], spans: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        replace(SCORES, **changed).require(plan_of("0-7"), spans)
    assert raised.value.code == "U505"


def test_scores_of_spans_are_one_for_each_start() -> None:
    replace(SCORES, span=3, values=(0.0,) * 6).require(plan_of("0-7"), (1, 3))
    SCORES.require(drop(plan_of("0-7"), [4]), (1,))


def test_removable_are_the_layers_that_run() -> None:
    assert removable(plan_of("7,0,3x2,5a"), 3) == (0, 3, 5, 7)


@pytest.mark.parametrize("number", [-1, 0, 4, 5])
def test_one_layer_stays_and_one_goes(number: int) -> None:
    with pytest.raises(
        UsageError, match=f"cannot remove {number} of 4 layers; remove 1 or more and leave one"
    ) as raised:
        removable(plan_of("7,0,3x2,5a"), number)
    assert raised.value.code == "U504"


def test_too_few_says_what_can_be_done() -> None:
    assert "ask for --drop 3" in str(too_few(3, 5))
    assert "--drop" not in str(too_few(0, 5))
    assert "only run live" in str(too_few(0, 5))
