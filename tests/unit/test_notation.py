"""Depth notation: what it means, that it comes back unchanged, and that nothing else comes out of it than a refusal."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import NotationError, PlanError, ShoalError
from shoal.plan import (
    KV,
    Exit,
    Map,
    Parallel,
    Plan,
    Run,
    Step,
    format_plan,
    format_steps,
    parse_plan,
    parse_steps,
    strip,
)
from shoal.plan.notation import MAX_STEPS
from unit import strategies
from unit.specs import llama, plan_of, two_stacks

CANONICAL: list[tuple[str, tuple[Step, ...]]] = [
    ("0-3,6", (Run(0), Run(1), Run(2), Run(3), Run(6))),
    ("3-0", (Run(3), Run(2), Run(1), Run(0))),
    ("12a,12m", (Run(12, "attention"), Run(12, "mlp"))),
    ("4-6m", (Run(4, "mlp"), Run(5, "mlp"), Run(6, "mlp"))),
    ("10x3", (Run(10), Run(10), Run(10))),
    ("10ax2", (Run(10, "attention"), Run(10, "attention"))),
    ("0-1,2x2,3-4", (Run(0), Run(1), Run(2), Run(2), Run(3), Run(4))),
    ("0-1,0", (Run(0), Run(1), Run(0))),
    ("13@12", (Run(13, kv=KV(12)),)),
    ("26@a25", (Run(26, kv=KV(attention=25)),)),
    ("13@v0", (Run(13, kv=KV(values=0)),)),
    ("13@k12@v0", (Run(13, kv=KV(keys=12, values=0)),)),
    ("15=tie-0:own", (Run(15, weights="own", tie="tie-0"),)),
    ("0-2=t", (Run(0, tie="t"), Run(1, tie="t"), Run(2, tie="t"))),
    ("26a@12@a25:w", (Run(26, "attention", "w", KV(12, attention=25)),)),
    ("13x2@12", (Run(13, kv=KV(12)),) * 2),
    ("20:new", (Run(20, weights="new"),)),
    ("20?g/project", (Run(20, gate="g", kv=KV(None, "project")),)),
    ("20a@3:w.1?g-2/copy", (Run(20, "attention", "w.1", KV(3, "copy"), "g-2"),)),
    ("(7|8)", (Parallel((Run(7), Run(8))),)),
    ("(7a|8m@2|9)mean", (Parallel((Run(7, "attention"), Run(8, "mlp", kv=KV(2)), Run(9)), "mean"),)),
    ("~12-15", (Map(12, 15, "map-12-15"),)),
    ("~12:fold?g", (Map(12, 12, "fold", "g"),)),
    ("!early", (Exit("early"),)),
    ("!early=h1?go", (Exit("early", "h1", "go"),)),
]


@pytest.mark.parametrize(("text", "steps"), CANONICAL, ids=[text for text, _ in CANONICAL])
def test_text_and_steps_are_one(text: str, steps: tuple[Step, ...]) -> None:
    assert parse_steps(text) == steps
    assert format_steps(steps) == text


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        (" 0 , 1,2 ", "0-2"),
        ("007", "7"),
        ("3-3", "3"),
        ("0-1x2", "0x2,1x2"),
        ("4-6@3", "4@3,5@3,6@3"),
        ("(0-2)", "(0|1|2)"),
        ("( 7 | 8 )sum", "(7|8)"),
        ("~4-4:map-4-4", "~4"),
        ("!e=base", "!e"),
        ("0,[1-2]x3,5", "0-2,1-2,1-2,5"),
        ("[ 1 , (2|3)mean ]x2", "1,(2|3)mean,1,(2|3)mean"),
        ("[4]x3", "4x3"),
        ("13@a12@v0", "13@v0@a12"),
        ("13@k3@v3", "13@k3@v3"),
    ],
)
def test_other_spellings_have_one_canonical_text(typed: str, canonical: str) -> None:
    assert format_steps(parse_steps(typed)) == canonical


@settings(max_examples=200)
@given(strategies.steps(9) | strategies.steps(3))
def test_parse_undoes_format(steps: tuple[Step, ...]) -> None:
    assert parse_steps(format_steps(steps)) == steps


@settings(max_examples=50)
@given(st.integers(0, 999_999), st.integers(-40, 40))
def test_large_layer_numbers_come_back(first: int, length: int) -> None:
    last = min(max(first + length, 0), 999_999)
    steps = parse_steps(f"{first}-{last}")
    assert [step.layer for step in steps if isinstance(step, Run)] == [
        *range(first, last, 1 if last > first else -1),
        last,
    ]
    assert format_steps(steps) == (f"{first}-{last}" if first != last else f"{first}")


@settings(max_examples=80)
@given(strategies.plans)
def test_parse_undoes_format_for_plans_of_several_stacks(plan: Plan) -> None:
    blank = Plan(plan.base, tuple((name, (Run(0),)) for name, _ in plan.stacks))
    assert parse_plan(format_plan(plan), blank) == plan
    assert str(plan) == format_plan(plan)


def test_a_stack_that_is_not_named_stays_as_it_is() -> None:
    assert str(plan_of("encoder: 0-1", two_stacks())) == "encoder: 0-1; decoder: 0-5"
    assert str(plan_of("0,2", two_stacks())) == "encoder: 0-3; decoder: 0,2"
    assert str(plan_of(" encoder : 3-0 ;\n decoder:0:w", two_stacks())) == "encoder: 3-0; decoder: 0:w"
    assert str(plan_of("decoder: 1")) == "1"


@pytest.mark.parametrize(
    ("text", "quoted", "why"),
    [
        ("", "", "empty"),
        ("0-3,x", "'x'", "expected layers"),
        ("0,,1", "'0,,1'", "between two commas"),
        ("5x0", "'5x0'", "0 times"),
        ("[3-4]x0", "'[3-4]x0'", "0 times"),
        ("[3-4]", "'[3-4]'", "expected layers"),
        ("[]x2", "'[]x2'", "nothing to run"),
        ("[3,[4]x2]x2", "'[3,['", "do not match"),
        ("([3|4]x2)", "'(['", "do not match"),
        ("[3|4)", "'[3|4)'", "do not match"),
        ("[0-999]x999", "'[0-999]x999'", "more than 10000"),
        ("3@1@2", "'3@1@2'", "two marks @"),
        ("3@1@v2", "'3@1@v2'", "from layer 1 already"),
        ("(7)", "'(7)'", "at least two"),
        ("(7|8", "'(7|8'", "not closed"),
        ("7)", "'7)'", "do not match"),
        ("((7|8)|9)", "'(('", "do not match"),
        ("(7|8)max", "'(7|8)max'", "sum, mean"),
        ("3?g/keep", "'3?g/keep'", "project, copy, defer, mask"),
        ("~5-3", "'~5-3'", "upwards"),
        ("0-99999", "'0-99999'", "more than 10000"),
        ("0x999999", "'0x999999'", "more than 10000"),
        ("0-9999,0", "'0'", "more than 10000"),
        ("(0-9998|0-9998)", "'(0-9998|0-9998)'", "more than 10000"),
        ("(0-4999|0),(0-4999|0)", "'(0-4999|0)'", "more than 10000"),
        ("-1", "'-1'", "expected layers"),
        ("1.5", "'1.5'", "expected layers"),
        ("1e3", "'1e3'", "expected layers"),
        ("٣-٥", "'٣-٥'", "expected layers"),
        ("³", "'³'", "expected layers"),
        ("\ud800", r"'\ud800'", "expected layers"),
        ("9" * 400, "'999", "expected layers"),
        ("(" * 100_000, "'(('", "do not match"),
        ("3:a b", "'3:a b'", "expected layers"),
        ("!", "'!'", "expected layers"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_a_refusal_quotes_the_piece_and_says_why(text: str, quoted: str, why: str) -> None:
    with pytest.raises(NotationError) as caught:
        parse_steps(text)
    message = str(caught.value)
    assert message.startswith("N001: ")
    assert quoted in message
    assert why in message
    assert len(message) < 250


def test_the_longest_plan_is_read() -> None:
    assert len(parse_steps(f"0-{MAX_STEPS - 1}")) == MAX_STEPS
    assert format_steps(parse_steps(f"{MAX_STEPS - 1}-0")) == f"{MAX_STEPS - 1}-0"


def test_a_group_too_large_is_refused_before_it_fills_the_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(NotationError, match="more than 10000"):
            parse_steps(f"({'|'.join(['0-9999'] * 50)})")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_a_stack_given_twice_is_refused() -> None:
    with pytest.raises(NotationError, match="'decoder' is given twice"):
        plan_of("0-3; decoder: 0-2", two_stacks())


def test_an_unknown_stack_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"P102: .*'vision'.*encoder, decoder"):
        plan_of("vision: 0", two_stacks())


@st.composite
def _spoiled(draw: st.DrawFn) -> str:
    """A legal text with a few characters put in, taken out or doubled."""
    text = draw(strategies.steps(9).map(format_steps))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.text(strategies.SIGNS, max_size=2)) + text[place + draw(st.integers(0, 2)) :]
    return text


@settings(max_examples=200)
@given(st.text(max_size=30) | st.text(strategies.SIGNS, max_size=30) | _spoiled())
def test_any_text_is_steps_or_a_refusal(text: str) -> None:
    try:
        steps = parse_steps(text)
    except NotationError:
        return
    assert steps
    assert parse_steps(format_steps(steps)) == steps


@settings(max_examples=150)
@given(st.text(max_size=30) | st.text(strategies.SIGNS + "encodr", max_size=30) | _spoiled())
def test_any_text_is_a_plan_or_a_refusal(text: str) -> None:
    base = Plan.identity(two_stacks())
    try:
        plan = parse_plan(text, base)
    except ShoalError as error:
        assert isinstance(error, NotationError | PlanError)  # noqa: PT017 - the other exceptions are the test's question
        return
    assert parse_plan(format_plan(plan), base) == plan


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("0-7", "████████"),
        ("0-2,5", "███··█··"),
        ("0a,1m,2a,2m,3m,3a", "▀▄██····"),
        ("0x2,1ax2,2,2m", "↻↻↻·····"),
        ("~1-3,(4|5a),7", "·≡≡≡∥∥·█"),
        ("0,!e,99,~6-200", "█·····≡≡"),
    ],
)
def test_the_strip_has_one_character_for_each_base_layer(text: str, marks: str) -> None:
    assert strip(plan_of(text)) == marks


def test_the_strip_of_another_stack() -> None:
    assert strip(plan_of("encoder: 1", two_stacks()), "encoder") == "·█··"
    assert strip(Plan.identity(llama())) == "█" * 8
