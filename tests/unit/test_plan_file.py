"""plan.json: it comes back unchanged, its hash never moves, and no bytes raise anything but a refusal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shoal.errors
from shoal.errors import NotationError, PlanError, WriteError
from shoal.plan import (
    KV,
    Base,
    Exit,
    Map,
    Parallel,
    Plan,
    Run,
    Step,
    format_plan,
    load_plan,
    parse_steps,
    plan_from_json,
    plan_to_json,
    save_plan,
)
from unit import strategies
from unit.specs import llama, plan_of, two_stacks

GOLDEN_TEXT = "0-3,(4|5)mean,6@3,~7-9,10x2,11a,11m?g/copy,!end=h"
GOLDEN = Plan(Base("llama", "sha256:0123", (("decoder", 12),)), (("decoder", parse_steps(GOLDEN_TEXT)),))
GOLDEN_HASH = "sha256:1b15e5891b04fdaf8b4e2e6001882cbccb99cd1e6ced3c9ea09f7d9bd0302c7a"


@settings(max_examples=100)
@given(strategies.plans)
def test_a_plan_comes_back_from_json(plan: Plan) -> None:
    for text in (plan_to_json(plan), plan_to_json(plan).encode()):
        back = plan_from_json(text)
        assert back == plan
        assert back.base.source == plan.base.source
        assert back.hash == plan.hash


def test_the_file_has_one_line_for_each_piece() -> None:
    text = plan_to_json(plan_of("encoder: 0-2; decoder: 0,(2|3),5", two_stacks()))
    lines = [line.strip(" ],") for line in text.splitlines()]
    assert {'"0-2"', '"0"', '"(2|3)"', '"5"'} <= set(lines)
    assert json.loads(text)["stacks"] == {"encoder": ["0-2"], "decoder": ["0", "(2|3)", "5"]}


def test_the_hash_is_golden() -> None:
    """Records and saved weights name plans by this hash: should it ever change, they all are orphans."""
    assert GOLDEN.hash == GOLDEN_HASH


@pytest.mark.parametrize("seed", ["0", "4711"])
def test_the_hash_does_not_depend_on_the_process(seed: str) -> None:
    code = "import sys; from shoal.plan import plan_from_json; print(plan_from_json(sys.stdin.read()).hash)"
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(shoal.errors.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], input=plan_to_json(GOLDEN), env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == GOLDEN_HASH


def test_the_hash_tells_what_runs_on_which_model() -> None:
    plan = plan_of("0-6")
    assert replace(plan, base=replace(plan.base, source="somewhere/else")).hash == plan.hash
    others = [plan_of("0-7"), plan_of("6-0"), plan_of("0-6?g"), replace(plan, base=replace(plan.base, fingerprint="x"))]
    assert len({plan.hash, *(other.hash for other in others)}) == 5


@settings(max_examples=60)
@given(strategies.steps(3), strategies.steps(3))
def test_plans_with_one_hash_run_the_same(one: tuple[Step, ...], other: tuple[Step, ...]) -> None:
    assert (GOLDEN.with_steps(one).hash == GOLDEN.with_steps(other).hash) == (one == other)


@pytest.mark.parametrize(
    "make",
    [
        lambda name: Run(0, weights=name),
        lambda name: Run(0, gate=name),
        lambda name: Map(0, 1, name),
        Exit,
        lambda name: Exit("e", head=name),
    ],
    ids=["weights", "gate", "map", "exit", "head"],
)
@pytest.mark.parametrize("name", ["", "a b", "a,1", "a?b", "ä", "a\n", "٣"])
def test_a_name_that_notation_cannot_write_is_refused(make: Any, name: str) -> None:
    with pytest.raises(PlanError, match=r"P117: the name .* use letters") as caught:
        make(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Run(0, part="attn"), "part 'attn'; use one of layer, attention, mlp"),  # type: ignore[arg-type]
        (lambda: KV(fill="keep"), "KV fill 'keep'; use one of project, copy, defer, mask"),  # type: ignore[arg-type]
        (lambda: Parallel((Run(0), Run(1)), "max"), "join 'max'; use one of sum, mean"),  # type: ignore[arg-type]
        (lambda: Plan(Base("f", "s", (("a b", 1),)), (("a b", (Run(0),)),)), "cannot be called 'a b'; use letters"),
    ],
    ids=["part", "fill", "join", "stack"],
)
def test_a_word_that_does_not_exist_is_refused(make: Any, words: str) -> None:
    with pytest.raises(PlanError, match="P117") as caught:
        make()
    assert words in str(caught.value)


def test_a_plan_has_the_stacks_of_its_model() -> None:
    plan = Plan.identity(two_stacks())
    for stacks in (plan.stacks[:1], plan.stacks[::-1], (*plan.stacks, ("vision", (Run(0),)))):
        with pytest.raises(PlanError, match=r"P102: .*\['encoder', 'decoder'\]"):
            Plan(plan.base, stacks)
    with pytest.raises(PlanError, match=r"P104: stack 'decoder' .* keep at least one"):
        plan.with_steps((), "decoder")


def _golden_json() -> Any:
    return json.loads(plan_to_json(GOLDEN))


def _but(path: str, value: Any) -> str:
    """The golden file with one value changed."""
    data = _golden_json()
    *outer, last = path.split(".")
    place = data
    for key in outer:
        place = place[key]
    place[last] = value
    return json.dumps(data)


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "empty": (b"", "not JSON"),
    "no utf-8": (b'{"format": "\xff\xfe\x00"}', "not JSON"),
    "a lone half of utf-16": (b"\xff\xfe\x00\xd8", "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "deep objects": ('{"a":' * 100_000, "not JSON"),
    "deep format": ('{"format":' + "[" * 900 + "]" * 900 + "}", "format"),
    "a number of 5000 digits": ("9" * 5000, "not JSON"),
    "NaN": ("NaN", "format"),
    "a list": ("[]", "format"),
    "no format": ("{}", "format"),
    "other format": (_but("format", "shoal-plan/99"), "'shoal-plan/99'"),
    "long format": (_but("format", "x" * 10_000), "format"),
    "no base": (_but("base", None), "base model"),
    "family": (_but("base.family", 3), "must be text"),
    "source": (_but("base.source", ["x"]), "must be text"),
    "no depths": (_but("base.stacks", {}), "depth"),
    "depth True": (_but("base.stacks.decoder", True), "number of layers"),
    "depth 0": (_but("base.stacks.decoder", 0), "number of layers"),
    "depth NaN": (_but("base.stacks.decoder", float("nan")), "number of layers"),
    "depth 1e400": (_but("base.stacks.decoder", 12).replace(": 12}", ": 1e400}"), "number of layers"),
    "depth of 400 digits": (_but("base.stacks.decoder", 10**400), "number of layers"),
    "stack name": (_but("base.stacks", {"a b": 12}), "'a b'"),
    "surrogate stack": (_but("base.stacks", {"\ud800": 12}), r"'\ud800'"),
    "missing stack": (_but("stacks", {}), "decoder"),
    "steps no list": (_but("stacks.decoder", "0-3"), "list of pieces"),
    "steps no text": (_but("stacks.decoder", [0, 1]), "list of pieces"),
    "no steps": (_but("stacks.decoder", []), "empty"),
    "bad step": (_but("stacks.decoder", ["0-3", "hello"]), "'hello'"),
    "layer": (_but("stacks.decoder", ["0-12"]), "layer 12; its layers are 0 to 11"),
    "KV source": (_but("stacks.decoder", ["0@12"]), "layer 12; its layers are 0 to 11"),
    "end of a map": (_but("stacks.decoder", ["~3-12"]), "layer 12; its layers are 0 to 11"),
    "other steps": (_but("stacks.decoder", ["0-11"]), "remove the hash"),
    "hash NaN": (_but("hash", float("nan")), "remove the hash"),
    "huge": (" " * 4_000_001, "larger than 4 MB"),
}


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_file_is_refused_in_one_short_sentence(text: str | bytes, words: str) -> None:
    with pytest.raises(NotationError) as caught:
        plan_from_json(text, where="my.json")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_file_without_a_hash_is_read() -> None:
    assert plan_from_json(_but("hash", None)) == GOLDEN


@settings(max_examples=150)
@given(st.binary(max_size=40) | st.text(max_size=40) | strategies.json_values.map(json.dumps))
def test_any_bytes_are_refused_with_a_notation_error(text: str | bytes) -> None:
    with pytest.raises(NotationError):
        plan_from_json(text)


@settings(max_examples=200)
@given(st.data())
def test_any_value_in_any_place_is_a_plan_or_a_refusal(data: st.DataObject) -> None:
    document = _golden_json()
    places = [(document, key) for key in document] + [(document["base"], key) for key in document["base"]]
    places += [(document["base"]["stacks"], "decoder"), (document["stacks"], "decoder")]
    place, key = data.draw(st.sampled_from(places))
    place[key] = data.draw(strategies.json_values | st.lists(st.text(strategies.SIGNS, max_size=6), max_size=3))
    if data.draw(st.booleans()):
        document.pop("hash")
    try:
        plan = plan_from_json(json.dumps(document))
    except NotationError:
        return
    assert plan_from_json(plan_to_json(plan)) == plan


def test_save_and_load(tmp_path: Path) -> None:
    plan = plan_of("0-3,6-7")
    save_plan(plan, tmp_path / "plan.json")
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == load_plan(str(tmp_path / "plan.json")) == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_load_finds_the_plan_in_a_written_folder(tmp_path: Path) -> None:
    (tmp_path / "shoal").mkdir()
    save_plan(Plan.identity(llama()), tmp_path / "shoal" / "plan.json")
    assert load_plan(tmp_path).is_identity()


def test_load_names_the_file_that_it_cannot_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no.json"):
        with pytest.raises(NotationError, match=r"cannot read the plan .*No such file.*; give a plan\.json") as caught:
            load_plan(path)
        assert str(path) in str(caught.value)
    (tmp_path / "large.json").write_bytes(b" " * 4_000_001)
    with pytest.raises(NotationError, match=r"large\.json is larger than 4 MB"):
        load_plan(tmp_path / "large.json")


def test_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"W215: cannot write the plan .*nowhere.*; choose another place"):
        save_plan(GOLDEN, tmp_path / "nowhere" / "plan.json")
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(WriteError, match="W215"):
        save_plan(GOLDEN, tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_the_golden_plan_holds_every_kind_of_step() -> None:
    assert format_plan(GOLDEN) == GOLDEN_TEXT
    assert {type(step) for step in GOLDEN.steps()} == {Run, Map, Parallel, Exit}
