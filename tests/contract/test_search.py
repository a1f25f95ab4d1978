"""Searches against brute force on made-up scores and objectives, and planted answers for all of the registry."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.api.budget import counted_budget
from shoal.api.journal import journaled
from shoal.errors import PlanError, UsageError, WriteError
from shoal.measures.block_influence import block_influence
from shoal.models.inspect import inspect as spec_of
from shoal.plan import Plan, check
from shoal.registry import Entry, entries
from shoal.scores import Scores
from shoal.search.contiguous import contiguous
from shoal.search.greedy import greedy
from shoal.search.listed import listed
from shoal.search.one_shot import one_shot
from shoal.search.position import position
from shoal.writing.surgery import blueprint

from ..unit.specs import llama, plan_of, two_stacks
from .families import tiny
from .planted import PLANTED, own_text, planted
from .shares import pairs

SEARCHES = [pytest.param(entry, id=entry.name) for entry in entries("search").values() if entry.removes]
DATA_FREE = {"listed", "position"}
WHOLE = plan_of("0-7")
NAN = math.nan
numbers = st.lists(st.integers(0, 5).map(float), min_size=8, max_size=8)
"""Few different values, so that ties happen."""


def anything(plan: Plan) -> bool:
    return True


def without(*layers: int) -> Callable[[Plan], bool]:
    """Legal as long as these layers run."""
    return lambda plan: set(layers) <= set(plan.layers())


def scored(values: list[float] | tuple[float, ...], span: int = 1, stack: str = "decoder") -> Scores:
    return Scores("fake", stack, "marks", tuple(values), (None,) * len(values), 1, 1, "nothing", span)


def twelve() -> Plan:
    from dataclasses import replace

    from ..unit.specs import layer, stack

    return plan_of("0-11", replace(llama(), stacks=(stack("decoder", *(layer(i) for i in range(12))),)))


def writable(model: Any) -> Callable[[Plan], bool]:
    spec = spec_of(model)

    @functools.cache
    def legal(plan: Plan) -> bool:
        if check(plan, spec):
            return False
        try:
            blueprint(model, plan)
        except WriteError:
            return False
        return True

    return legal


@pytest.mark.parametrize(("entry", "family"), pairs(2, SEARCHES, PLANTED))
def test_a_search_that_looks_removes_the_layer_that_does_nothing_first(entry: Entry, family: str) -> None:
    model, data, function = planted(family), own_text(family), entry.load()
    plan, layer = Plan.identity(spec_of(model)), PLANTED[family]
    wanted = inspect.signature(function).parameters
    if not {"scores", "objective"} & set(wanted):
        assert entry.name in DATA_FREE, "a search that looks at nothing is a position preset"
        assert not {"data", "model", "task"} & set(wanted)
        return
    given_ = {
        "scores": lambda: block_influence(model, data, batch=16),
        "objective": lambda: journaled(model, plan, batch=16)(data),
        "legal": lambda: writable(model),
        "drop": lambda: 1,
        **({} if "drop" in wanted else {"budget": lambda: counted_budget("layers", 0.75, spec_of(model))}),
    }
    few = {"trials": 12} if "trials" in wanted else {}
    found = function(plan, **{name: make() for name, make in given_.items() if name in wanted}, **few)
    assert found.plan.dropped() == (layer,)
    assert found.trace[0].notation == str(found.plan)


@given(numbers, st.integers(1, 7))
def test_one_shot_removes_the_set_with_the_lowest_sum(values: list[float], number: int) -> None:
    found = one_shot(WHOLE, scores=scored(values), drop=number, legal=anything)
    best = min(itertools.combinations(range(8), number), key=lambda layers: (sum(values[i] for i in layers), layers))
    assert sum(values[i] for i in found.plan.dropped()) == sum(values[i] for i in best)
    ranked = sorted(range(8), key=lambda i: (values[i], i))
    assert found.plan.dropped() == tuple(sorted(ranked[:number])), "ties go to the lower layer"
    assert [c.note for c in found.trace] == [f"layer {i} removed" for i in ranked[:number]]
    assert found.trace[-1].notation == str(found.plan)
    assert found.scores is not None


@given(numbers, st.integers(1, 7), st.sets(st.integers(0, 7), max_size=3))
def test_one_shot_removes_the_lowest_that_may_go(values: list[float], number: int, keep: set[int]) -> None:
    free = [i for i in sorted(range(8), key=lambda i: (values[i], i)) if i not in keep]
    if number > len(free):
        with pytest.raises(UsageError, match=f"only {len(free)} layers may go, not {number}; ask for --drop") as raised:
            one_shot(WHOLE, scores=scored(values), drop=number, legal=without(*keep))
        assert raised.value.code == "U504"
    else:
        found = one_shot(WHOLE, scores=scored(values), drop=number, legal=without(*keep))
        assert found.plan.dropped() == tuple(sorted(free[:number]))
        kept = {c.note.split()[1] for c in found.trace if "kept: not legal without it" in c.note}
        assert kept <= {str(i) for i in keep}


def test_one_shot_looks_again_at_a_layer_once_what_needs_it_is_gone() -> None:
    def legal(plan: Plan) -> bool:  # 5 needs 2
        return 2 in plan.layers() or 5 not in plan.layers()

    scores = scored([9, 8, 0, 7, 6, 1, 5, 2])
    assert one_shot(WHOLE, scores=scores, drop=1, legal=legal).plan.dropped() == (5,)
    found = one_shot(WHOLE, scores=scores, drop=3, legal=legal)
    assert found.plan.dropped() == (2, 5, 7)
    assert [c.note for c in found.trace] == [
        "layer 2 kept: not legal without it",
        "layer 5 removed",
        "layer 2 removed",
        "layer 7 removed",
    ]


def test_one_shot_leaves_layers_that_were_not_judged() -> None:
    scores = scored([NAN, 3, NAN, 1, NAN, NAN, NAN, NAN])
    assert one_shot(WHOLE, scores=scores, drop=2, legal=anything).plan.dropped() == (1, 3)
    with pytest.raises(UsageError, match="only 2 layers may go, not 3; ask for --drop 2"):
        one_shot(WHOLE, scores=scores, drop=3, legal=anything)
    with pytest.raises(UsageError, match=r"no layer may go: .* allow plans that only run live"):
        one_shot(WHOLE, scores=scored([NAN] * 8), drop=2, legal=anything)


@given(numbers, st.integers(1, 7), st.sets(st.integers(0, 7), max_size=2), st.booleans())
def test_contiguous_removes_the_lowest_legal_span(
    values: list[float], number: int, keep: set[int], by_span: bool
) -> None:
    sums = [sum(values[first : first + number]) for first in range(8 - number + 1)]
    if by_span:
        sums = values[: 8 - number + 1]
    scores = scored(sums, number) if by_span else scored(values)
    free = [first for first in range(len(sums)) if not keep & set(range(first, first + number))]
    if not free:
        with pytest.raises(UsageError, match=f"no {number} neighbouring layers may go together; remove another number"):
            contiguous(WHOLE, scores=scores, drop=number, legal=without(*keep))
        return
    found = contiguous(WHOLE, scores=scores, drop=number, legal=without(*keep))
    best = min(free, key=lambda first: (sums[first], first))
    assert found.plan.dropped() == tuple(range(best, best + number))
    assert found.trace[-1].score == sums[best]
    assert [c.score for c in found.trace] == sorted(c.score for c in found.trace)
    assert all("kept: not legal without them" in c.note for c in found.trace[:-1])


def test_contiguous_leaves_spans_that_were_not_judged() -> None:
    scores = scored([0, NAN, 0, 5, 5, 5, 1, 5])
    assert contiguous(WHOLE, scores=scores, drop=2, legal=anything).plan.dropped() == (2, 3)
    assert contiguous(WHOLE, scores=scored([NAN, 2, 3], 6), drop=6, legal=anything).plan.dropped() == (1, 2, 3, 4, 5, 6)
    with pytest.raises(UsageError) as raised:
        contiguous(WHOLE, scores=scored([NAN] * 8), drop=2, legal=anything)
    assert raised.value.code == "U504"


@given(st.lists(st.integers(0, 30), min_size=64, max_size=64), st.sets(st.integers(0, 7), max_size=2))
def test_greedy_is_brute_force_in_each_round_and_nested(marks: list[int], keep: set[int]) -> None:
    """The objective has interactions: a made-up mark for each pair of layers that are both gone."""
    calls: list[str] = []

    def objective(plan: Plan) -> float:
        calls.append(str(plan))
        return float(sum(marks[8 * a + b] for a, b in itertools.product(plan.dropped(), repeat=2)))

    def value(gone: tuple[int, ...]) -> float:
        return float(sum(marks[8 * a + b] for a, b in itertools.product(sorted(gone), repeat=2)))

    gone: tuple[int, ...] = ()
    for number in range(1, 8 - max(1, len(keep)) + 1):
        gone += (min((i for i in range(8) if i not in (*gone, *keep)), key=lambda i: (value((*gone, i)), i)),)
        calls.clear()
        found = greedy(WHOLE, objective=objective, drop=number, legal=without(*keep))
        assert found.plan.dropped() == tuple(sorted(gone)), "the smaller budget is a prefix, ties go to the lower layer"
        assert [c.note for c in found.trace] == [f"layer {i} removed" for i in gone]
        assert found.trace[-1].score == value(gone)
        assert len(calls) == sum(8 - len(keep) - k for k in range(number))


def test_greedy_says_how_many_may_go() -> None:
    with pytest.raises(UsageError, match="only 2 layers may go, not 4; ask for --drop 2") as raised:
        greedy(WHOLE, objective=lambda plan: 0.0, drop=4, legal=without(0, 1, 2, 3, 4, 5))
    assert raised.value.code == "U504"
    with pytest.raises(UsageError, match="no layer may go"):
        greedy(WHOLE, objective=lambda plan: NAN, drop=4, legal=anything)


def test_greedy_never_chooses_what_has_no_value() -> None:
    def objective(plan: Plan) -> float:
        return NAN if 0 not in plan.layers() else math.inf if 1 not in plan.layers() else float(len(str(plan)))

    assert not {0, 1} & set(greedy(WHOLE, objective=objective, drop=6, legal=anything).plan.dropped())
    assert 1 in greedy(WHOLE, objective=objective, drop=7, legal=anything).plan.dropped()


def test_greedy_reports_every_candidate() -> None:
    reports: list[tuple[int, int, str]] = []
    greedy(WHOLE, objective=lambda p: 0.0, drop=2, legal=without(3), progress=lambda *report: reports.append(report))
    assert [done for done, _, _ in reports] == list(range(1, 14)), "7 + 6 candidates that are legal"
    assert {total for _, total, _ in reports} == {13}
    assert reports[-1][2] == "round 2 of 2"


def test_listed_removes_exactly_what_is_named() -> None:
    assert listed(WHOLE, layers=(5, 2), legal=anything).plan.dropped() == (2, 5)
    with pytest.raises(UsageError, match=r"without the layers \[2\] the plan is not legal; name others") as raised:
        listed(WHOLE, layers=(2,), legal=without(2))
    assert raised.value.code == "U506"
    for layers, code in (((8,), "P103"), (tuple(range(8)), "P104")):
        with pytest.raises(PlanError) as refused:
            listed(WHOLE, layers=layers, legal=anything)
        assert refused.value.code == code


@pytest.mark.parametrize(
    ("which", "number", "gone"),
    [
        ("first", 4, {0, 1, 2, 3}),
        ("last", 4, {8, 9, 10, 11}),
        ("middle", 4, {4, 5, 6, 7}),
        ("middle", 3, {4, 5, 6}),
        ("middle", 11, set(range(11))),
        ("alternate", 1, {10}),
        ("alternate", 4, {4, 6, 8, 10}),
        ("alternate", 6, {0, 2, 4, 6, 8, 10}),
        ("alternate", 8, {0, 2, 4, 6, 8, 9, 10, 11}),
        ("alternate", 11, set(range(12)) - {1}),
    ],
)
def test_presets_of_twelve_layers(which: Any, number: int, gone: set[int]) -> None:
    found = position(twelve(), drop=number, legal=anything, which=which)
    assert set(found.plan.dropped()) == gone
    assert found.trace[0].note == f"preset {which}" and math.isnan(found.trace[0].score)
    assert found.scores is None


def test_random_layers_follow_the_seed_and_are_nested() -> None:
    def gone(number: int, seed: int) -> set[int]:
        return set(position(twelve(), drop=number, legal=anything, which="random", seed=seed).plan.dropped())

    assert gone(4, 1) == gone(4, 1)
    assert len({frozenset(gone(4, seed)) for seed in range(20)}) > 15
    for number in range(2, 12):
        assert len(gone(number, 3)) == number
        assert gone(number - 1, 3) < gone(number, 3)


def test_a_preset_that_is_not_legal_or_does_not_exist_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"not legal without the last layers \[6, 7\]; choose another preset"
    ) as raised:
        position(WHOLE, drop=2, legal=without(7))
    assert raised.value.code == "U504"
    with pytest.raises(UsageError, match="no preset 'lst'; use first, last, middle") as refused:
        position(WHOLE, drop=2, legal=anything, which="lst")  # type: ignore[arg-type]
    assert refused.value.code == "U502"


def searches(stack: str | None = None, depth: int = 8) -> dict[str, Callable[..., Any]]:
    """Each search that takes a number, as (plan, drop, legal) -> found; the first layers matter least."""
    given: dict[str, Any] = {
        "scores": scored([float(i) for i in range(depth)], stack=stack or "decoder"),
        "objective": lambda plan: float(sum(plan.dropped(stack))),
        "which": "first",
    }
    found: dict[str, Callable[..., Any]] = {}
    for name, entry in entries("search").items():
        known = inspect.signature(entry.load()).parameters
        if "drop" in known:
            found[name] = functools.partial(
                entry.load(), stack=stack, **{key: given[key] for key in given if key in known}
            )
    return found


@pytest.mark.parametrize("name", searches())
@pytest.mark.parametrize("number", [-1, 0, 8, 9])
def test_a_budget_leaves_a_layer_and_takes_one(name: str, number: int) -> None:
    with pytest.raises(UsageError, match=f"cannot remove {number} of 8 layers") as raised:
        searches()[name](WHOLE, drop=number, legal=anything)
    assert raised.value.code == "U504"


@pytest.mark.parametrize("name", searches())
def test_a_search_goes_on_from_a_plan_that_is_smaller_already(name: str) -> None:
    found = searches()[name](plan_of("7,1x2,3-5"), drop=2, legal=anything)
    gone = {"contiguous": (0, 2, 3, 4, 6)}.get(name, (0, 1, 2, 3, 6))
    assert found.plan.dropped() == gone, "1 and 2 do not run next to each other, 1 and 3 are no neighbours"


@pytest.mark.parametrize("name", searches())
def test_a_search_works_on_the_stack_that_is_named(name: str) -> None:
    plan = Plan.identity(two_stacks())
    found = searches("encoder", 4)[name](plan, drop=2, legal=anything)
    assert (found.plan.dropped("encoder"), found.plan.dropped("decoder")) == ((0, 1), ())


def test_scores_of_other_spans_or_models_are_refused() -> None:
    for search, scores, message in (
        (one_shot, scored([1.0] * 7, 2), "judge spans of 2 layers, not of 1; measure again"),
        (contiguous, scored([1.0] * 6, 3), "judge spans of 3 layers, not of 1 or 2; measure again"),
        (one_shot, scored([1.0] * 4), "these 4 scores judge a stack 'decoder', not the 8 layers of 'decoder'"),
        (contiguous, scored([1.0] * 8, stack="encoder"), "judge a stack 'encoder'"),
    ):
        with pytest.raises(UsageError, match=message) as raised:
            search(WHOLE, scores=scores, drop=2, legal=anything)
        assert raised.value.code == "U505"


def test_plans_that_a_hybrid_cannot_write_are_avoided() -> None:
    """Jamba's attention is every second layer: without 2 the rest is mamba, attention, attention."""
    model = tiny("jamba")
    plan, legal = Plan.identity(spec_of(model)), writable(model)
    scores = scored([3.0, 2.0, 0.0, 4.0])
    assert one_shot(plan, scores=scores, drop=1, legal=anything).plan.dropped() == (2,)
    found = one_shot(plan, scores=scores, drop=1, legal=legal)
    assert found.plan.dropped() == (1,)
    assert found.trace[0].note == "layer 2 kept: not legal without it"
    assert one_shot(plan, scores=scores, drop=2, legal=legal).plan.dropped() == (1, 2)
    assert contiguous(plan, scores=scores, drop=1, legal=legal).plan.dropped() == (1,)
    by_scores = greedy(plan, objective=lambda p: sum(scores.values[i] for i in p.dropped()), drop=2, legal=legal)
    assert by_scores.plan.dropped() == (1, 2)
    with pytest.raises(UsageError, match="U506"):
        listed(plan, layers=(2,), legal=legal)


def test_a_layer_whose_kv_others_read_stays_until_they_are_gone() -> None:
    """Gemma 3n: 2 reads the KV of 0, and 3 that of 1."""
    spec = spec_of(tiny("gemma3n_text"))
    plan = Plan.identity(spec)

    def legal(smaller: Plan) -> bool:
        return not check(smaller, spec)

    scores = scored([1.0, 0.0, 4.0, 3.0])
    assert one_shot(plan, scores=scores, drop=1, legal=legal).plan.dropped() == (3,)
    assert one_shot(plan, scores=scores, drop=2, legal=legal).plan.dropped() == (1, 3)
    with pytest.raises(UsageError, match="not legal without the first layers"):
        position(plan, drop=1, legal=legal, which="first")
    assert contiguous(plan, scores=scores, drop=2, legal=legal).plan.dropped() == (2, 3)
