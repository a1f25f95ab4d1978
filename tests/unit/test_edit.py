"""The verbs from plan to plan: layers keep the base model's index, and what cannot be done is refused, not skipped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import PlanError
from shoal.plan import (
    Plan,
    Run,
    drop,
    exit_at,
    gate,
    keep,
    parallel,
    parse_steps,
    reorder,
    repeat,
    replace,
    require,
    share_kv,
)
from shoal.plan.edit import share_map, with_weights
from unit.specs import llama, plan_of, two_stacks

WHOLE = Plan.identity(llama())
some_layers = st.sets(st.integers(0, 7), min_size=1, max_size=7)


def _same_model(plan: Plan) -> None:
    assert plan.base == WHOLE.base
    assert require(plan, llama()) is plan


def test_drop_keeps_base_indices() -> None:
    plan = drop(drop(WHOLE, [2, 3]), [5])
    assert str(plan) == "0-1,4,6-7"
    assert plan.layers() == (0, 1, 4, 6, 7)
    assert plan.dropped() == (2, 3, 5)
    assert plan.depth() == 8
    assert not plan.is_identity()
    assert WHOLE.is_identity(), "an edit returns a new plan"
    _same_model(plan)


@settings(max_examples=50)
@given(some_layers)
def test_drop_and_keep_are_one(layers: set[int]) -> None:
    kept = keep(WHOLE, layers)
    assert kept == drop(WHOLE, set(range(8)) - layers)
    assert kept.layers() == tuple(sorted(layers))
    assert kept.dropped() == tuple(sorted(set(range(8)) - layers))
    assert keep(kept, layers) == kept


@settings(max_examples=50)
@given(st.permutations(range(8)), st.integers(0, 3), st.integers(0, 4))
def test_drops_in_a_row_are_one_drop(order: list[int], one: int, other: int) -> None:
    first, second = order[:one], order[one : one + other]
    assert drop(drop(WHOLE, first), second) == drop(drop(WHOLE, second), first) == drop(WHOLE, first + second)


@settings(max_examples=50)
@given(st.sets(st.integers(0, 7), max_size=7))
def test_attention_then_mlp_is_the_whole_layer(layers: set[int]) -> None:
    one_way = drop(drop(WHOLE, layers, part="attention"), layers, part="mlp")
    other_way = drop(drop(WHOLE, layers, part="mlp"), layers, part="attention")
    assert one_way == other_way == drop(WHOLE, layers)


def test_drop_of_a_part_leaves_the_other() -> None:
    plan = drop(drop(WHOLE, [2, 3], part="mlp"), [5], part="attention")
    assert str(plan) == "0-1,2-3a,4,5m,6-7"
    assert plan.dropped() == ()
    _same_model(plan)


def test_a_layer_left_with_its_mlp_reads_and_fills_no_kv() -> None:
    assert str(drop(plan_of("0-2,3@2:w,4?g/copy"), [3, 4], part="attention")) == "0-2,3m:w,4m?g"
    assert str(drop(plan_of("0-2,3@2:w,4?g/copy"), [3, 4], part="mlp")) == "0-2,3a@2:w,4a?g/copy"


def test_drop_inside_a_group_opens_it_when_one_is_left() -> None:
    plan = plan_of("0,(1|2|3)mean,4")
    assert str(drop(plan, [2])) == "0,(1|3)mean,4"
    assert str(drop(plan, [1, 2])) == "0,3-4"
    assert str(drop(plan, [1, 2, 3])) == "0,4"
    assert str(drop(plan, [2], part="mlp")) == "0,(1|2a|3)mean,4"


def test_drop_leaves_maps_and_exits() -> None:
    assert str(drop(plan_of("0-2,~3-4,!e?g,5-7"), [5])) == "0-2,~3-4,!e?g,6-7"
    assert str(keep(plan_of("0-2,~3-4,!e?g,5-7"), [0])) == "0,~3-4,!e?g"


def test_edits_name_their_stack() -> None:
    plan = Plan.identity(two_stacks())
    assert str(drop(plan, [3], stack="encoder")) == "encoder: 0-2; decoder: 0-5"
    assert str(drop(plan, [3])) == "encoder: 0-3; decoder: 0-2,4-5"
    with pytest.raises(PlanError, match=r"P103: layer 5 does not run .*\(stack encoder, 4 base layers, 0-based\)"):
        drop(plan, [5], stack="encoder")
    with pytest.raises(PlanError, match=r"P102: .*'vision'; it has encoder, decoder"):
        drop(plan, [5], stack="vision")


@pytest.mark.parametrize(
    "edit",
    [
        lambda plan: drop(plan, [1, 3]),
        lambda plan: drop(plan, [3], part="mlp"),
        lambda plan: keep(plan, [3]),
        lambda plan: repeat(plan, [3]),
        lambda plan: reorder(plan, [0, 3]),
        lambda plan: replace(plan, 2, 3),
        lambda plan: parallel(plan, [2, 3]),
        lambda plan: share_kv(plan, 3, 2),
        lambda plan: share_kv(plan, 4, 3),
        lambda plan: gate(plan, [3]),
        lambda plan: exit_at(plan, 3),
    ],
    ids=["drop", "part", "keep", "repeat", "reorder", "replace", "parallel", "share_kv", "source", "gate", "exit_at"],
)
def test_every_edit_names_the_layer_that_does_not_run(edit: Callable[[Plan], Plan]) -> None:
    with pytest.raises(PlanError, match=r"P103: .*layer 3 does not run in the plan 0-2,4-7 .*; name layers that do"):
        edit(drop(WHOLE, [3]))


def test_a_part_that_does_not_run_is_named() -> None:
    with pytest.raises(PlanError, match="P103: the mlp of layer 2 does not run"):
        drop(plan_of("0-1,2a"), [2], part="mlp")
    with pytest.raises(PlanError, match="P103: the attention of layer 2 does not run"):
        share_kv(plan_of("0-1,2m"), 2, 1)


def test_the_last_layer_cannot_go() -> None:
    with pytest.raises(PlanError, match=r"P104: stack 'decoder' .*; keep at least one"):
        drop(plan_of("3"), [3])
    with pytest.raises(PlanError, match="P104"):
        keep(WHOLE, [])
    with pytest.raises(PlanError, match="P104"):
        reorder(WHOLE, [])


def test_repeat() -> None:
    assert str(repeat(WHOLE, [2, 5], 3)) == "0-1,2x3,3-4,5x3,6-7"
    assert str(repeat(plan_of("0,1a:w"), [1])) == "0,1ax2:w"
    assert repeat(WHOLE, [2], 1) == WHOLE
    assert str(repeat(plan_of("0,(1|2),3,~4-5"), [3])) == "0,(1|2),3x2,~4-5"
    with pytest.raises(PlanError, match=r"P120: cannot repeat 0 times; give 1 or more"):
        repeat(WHOLE, [2], 0)
    with pytest.raises(PlanError, match=r"P120: .*\(1\|2\); repeat before grouping"):
        repeat(plan_of("0,(1|2),3"), [2])


@settings(max_examples=30)
@given(st.permutations(range(8)))
def test_reorder_runs_the_layers_in_that_order(order: list[int]) -> None:
    plan = reorder(WHOLE, order)
    assert plan.layers() == tuple(order)
    assert reorder(plan, range(8)) == WHOLE


def test_reorder_drops_repeats_and_takes_parts_along() -> None:
    assert str(reorder(plan_of("0-2,3a,3m?g"), [3, 0, 3])) == "3a,3m?g,0,3a,3m?g"
    for text, step in (("0,~1-2", "~1-2"), ("0,(1|2)", r"\(1\|2\)"), ("0,!e", "!e")):
        with pytest.raises(PlanError, match=rf"P120: cannot reorder a plan with {step}; reorder first"):
            reorder(plan_of(text), [0])


def test_replace_puts_one_map_where_the_span_ran() -> None:
    assert str(replace(WHOLE, 2, 4)) == "0-1,~2-4,5-7"
    assert str(replace(WHOLE, 2, 2, weights="fold")) == "0-1,~2:fold,3-7"
    assert str(replace(plan_of("0-1,2x2,3a,3m,!e?g,4,5-7"), 2, 4)) == "0-1,~2-4,!e?g,5-7"
    assert str(replace(plan_of("0-1,(2|3),4"), 2, 3)) == "0-1,~2-3,4"
    assert str(replace(plan_of("0,1,~2-3,4,5"), 1, 4)) == "0,~1-4,5"
    assert replace(WHOLE, 2, 4).dropped() == (2, 3, 4)


@pytest.mark.parametrize(
    ("text", "first", "last", "words"),
    [
        ("0-7", 5, 3, r"the span 5-3 of a map must go upwards; write 3-5"),
        ("0-1,(2|3),4", 3, 4, r"the span 3-4 cuts through \(2\|3\); take it in whole"),
        ("0,~1-3,4,2", 2, 4, r"the span 2-4 cuts through ~1-3; take it in whole"),
    ],
)
def test_replace_refuses_a_span_that_it_cannot_take(text: str, first: int, last: int, words: str) -> None:
    with pytest.raises(PlanError, match=f"P114: {words}"):
        replace(plan_of(text), first, last)


def test_parallel_groups_neighbours() -> None:
    assert str(parallel(WHOLE, [3, 2])) == "0-1,(2|3),4-7"
    assert str(parallel(WHOLE, [5, 6, 7], join="mean")) == "0-4,(5|6|7)mean"
    assert str(parallel(plan_of("0,2a?g,1m"), [1, 2])) == "0,(2a?g|1m)"
    _same_model(parallel(WHOLE, [0, 1]))


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0-7", [2, 4]), ("0-7", [2]), ("0,(1|2),3,4", [2, 3, 4]), ("0,1,~5-6,2", [1, 2]), ("0-7", [])],
    ids=["apart", "alone", "already grouped", "a map between", "none"],
)
def test_parallel_refuses_what_does_not_stand_together(text: str, layers: list[int]) -> None:
    with pytest.raises(PlanError, match=r"P118: layers .* do not stand next to each other") as caught:
        parallel(plan_of(text), layers)
    assert f"{layers} do not" in str(caught.value)
    assert "name two or more neighbours" in str(caught.value)


def test_share_kv() -> None:
    plan = share_kv(WHOLE, 4, 3)
    assert str(plan) == "0-3,4@3,5-7"
    _same_model(plan)
    assert str(share_kv(plan_of("0-3,4a?g/copy,4m,5"), 4, 3)) == "0-3,4a@3?g,4m,5", "the mlp has no KV"
    assert str(share_kv(plan_of("0-2,(3|4:w)"), 4, 2)) == "0-2,(3|4@2:w)"


def test_share_map_and_with_weights() -> None:
    assert str(share_map(WHOLE, 5, 3)) == "0-4,5@a3,6-7"
    assert str(share_map(plan_of("0,1a,1m,(2|3)"), 3, 0)) == "0,1a,1m,(2|3@a0)"
    assert str(with_weights(plan_of("0,1a,1m,2@0"), {1: "w", 2: "v"})) == "0,1a:w,1m,2@0:v"
    for wrong in (lambda: share_map(WHOLE, 8, 3), lambda: with_weights(plan_of("0,1m,2"), {1: "w"})):
        with pytest.raises(PlanError, match="P103"):
            wrong()
    _same_model(share_map(WHOLE, 5, 3))


def test_gate() -> None:
    assert str(gate(WHOLE, [2, 5])) == "0-1,2?skip.2,3-4,5?skip.5,6-7"
    plan = gate(plan_of("0,1,2@1,3a,3m,(4|5)"), [2, 3, 4], fill="project")
    assert str(plan) == "0-1,2@1?skip.2,3a?skip.3/project,3m?skip.3,(4?skip.4/project|5)"
    _same_model(plan)


def test_exit_at() -> None:
    assert str(exit_at(WHOLE, 3)) == "0-3,!exit-3?exit.3,4-7"
    assert str(exit_at(WHOLE, 7, name="end", head="h2")) == "0-7,!end=h2?exit.7"
    assert str(exit_at(plan_of("0,1,0,2"), 0)) == "0-1,0,!exit-0?exit.0,2", "behind the last run"
    assert str(exit_at(plan_of("0,(1|2),3"), 1)) == "0,(1|2),!exit-1?exit.1,3"
    _same_model(exit_at(WHOLE, 3))


def test_steps_are_told_stack_by_stack() -> None:
    plan = plan_of("encoder: 1-2; decoder: 0,5", two_stacks())
    assert plan.steps() == (Run(0), Run(5))
    assert plan.steps("encoder") == (Run(1), Run(2))
    assert plan.layers("encoder") == (1, 2)
    assert plan.dropped("encoder") == (0, 3)
    assert plan.depth("encoder") == 4
    assert plan.with_steps(parse_steps("3"), "encoder").steps("encoder") == (Run(3),)
    assert plan_of("encoder: 1-2", two_stacks()).stack_name() == "decoder"
    assert not plan_of("encoder: 0-2", two_stacks()).is_identity()
