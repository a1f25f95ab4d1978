"""Is a plan legal? Every code has a plan that earns it, and its message names the layer and what to do."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace

import pytest

from shoal.errors import PlanError
from shoal.plan import Exit, Map, Parallel, Plan, Run, Spec, check, parse_plan, require, share_kv
from unit.specs import alternating, hybrid, layer, llama, native_sharing, plan_of, spec, stack, two_stacks

MODELS = {make.__name__: make() for make in (llama, alternating, hybrid, two_stacks, native_sharing)}
MAP = {"map-2-3.weight": (16, 16), "map-2-3.bias": (16,)}

LEGAL = [
    ("llama", "7-0", {}),
    ("llama", "0-1,2a,3m,4x3,(5|6),7", {}),
    ("llama", "7a", {}),
    ("llama", "0-2,3@2,4@2?g,5,5@5", {}),
    ("llama", "0-2,3@a2,4@a2,5@v3@a2", {}),
    ("llama", "0,1?g/project,2m?g,!e?g,3", {}),
    ("llama", "0-1,~2-3,4-7", MAP),
    ("llama", "0-1,~2-3,4-7", {"map-2-3.down": (4, 16), "map-2-3.up": (16, 4)}),
    ("llama", "0-1,~2-3,4-7", {"map-2-3.gate": (4, 16), "map-2-3.up": (16, 4)}),
    ("llama", "0-1,~2-3,4-7", {"map-2-3.gate": (4, 16), "map-2-3.down": (4, 16), "map-2-3.up": (16, 4)}),
    ("llama", "0,1:new,!e=head?g,2,!end", {"new.q": (3, 3), "head.weight": (128, 16)}),
    ("alternating", "0-2,3@1,4@2", {}),
    ("hybrid", "3,0,5,7@3", {}),
    ("llama", "0-1,2-4=1,5m=0,6=0@4,7=1?g", {}),
    ("llama", "1=0,2:x", {"x.q": (3, 3)}),
    ("alternating", "0,1=0,2=0", {}),
    ("hybrid", "7,0?g", {}),
    ("two_stacks", "encoder: 3; decoder: 0a,2", {}),
    ("native_sharing", "3-5,0", {}),
    ("native_sharing", "0,4m", {}),
]

ILLEGAL = [
    ("P103", "llama", "0-8", {}, 8, ["layer 8 ", "0 to 7 (0-based, model.decoder.layers)"]),
    ("P103", "llama", "0-3,4@9", {}, 9, ["KV source 9 ", "0 to 7"]),
    ("P103", "llama", "0-3,~4-8", {}, 8, ["end of a map 8 ", "0 to 7"]),
    ("P105", "hybrid", "3,5m", {}, 5, ["layer 5 ", "mlp alone", "kind is mlp", "run the whole layer (5) or drop it"]),
    ("P105", "hybrid", "3,5a", {}, 5, ["layer 5 ", "attention alone", "run the whole layer (5)"]),
    ("P106", "llama", "0-7m", {}, None, ["decoder", "counts the tokens", "keep one whole, for example 0"]),
    ("P106", "hybrid", "0-2,4-6", {}, None, ["decoder", "keep one whole, for example 3"]),
    ("P107", "llama", "4@5,6", {}, 4, ["layer 4 reads the KV of layer 5", "does not run", "choose a layer that does"]),
    ("P107", "llama", "0,4@4", {}, 4, ["layer 4 reads the KV of layer 4", "does not run with KV of its own"]),
    ("P107", "llama", "0,4@5,5m", {}, 4, ["layer 4 reads the KV of layer 5", "does not run with KV of its own"]),
    ("P107", "llama", "0,(4@5|5),5", {}, 4, ["layer 4 reads the KV of layer 5", "in another step"]),
    ("P107", "llama", "0-1,2@1,3@2", {}, 3, ["layer 3 reads the KV of layer 2", "does not run with KV of its own"]),
    ("P107", "llama", "0,1m,2@1", {}, 2, ["layer 2 reads the KV of layer 1", "choose a layer"]),
    ("P107", "llama", "0,(1|2@1)", {}, 2, ["layer 2 reads the KV of layer 1", "choose a layer"]),
    (
        "P108",
        "alternating",
        "0,1@0",
        {},
        1,
        ["layer 1 reads the KV of layer 0", "window 4", "a source of the same kind"],
    ),
    ("P109", "llama", "0,1m@0", {}, 1, ["layer 1 reads the KV of layer 0", "only its mlp", "write 1m without @"]),
    ("P109", "hybrid", "0,3,7@0", {}, 0, ["layer 7 reads the KV of layer 0", "linear_attention", "drop the @"]),
    ("P109", "hybrid", "3,4@3", {}, 4, ["layer 4 (linear_attention) has no KV", "drop the @"]),
    ("P164", "llama", "4@a5,5", {}, 4, ["layer 4 takes over the attention map of layer 5", "name an earlier layer"]),
    ("P164", "llama", "4@k5,5", {}, 4, ["layer 4 reads the keys of layer 5", "write 4@5"]),
    ("P164", "llama", "4@v5,5", {}, 4, ["layer 4 reads the values of layer 5", "write 4@5"]),
    ("P164", "llama", "0,4@5@a0,5", {}, 4, ["layer 4 reads the KV of layer 5", "write 4@5 alone"]),
    ("P164", "llama", "0,1@3,2@a1,3", {}, 2, ["map of layer 1", "reads a layer that runs later", "name another"]),
    ("P165", "llama", "0-2,!end=h", {"h.reads.4": (1,)}, 4, ["h.reads.4 of exit end", "does not run in front of it"]),
    ("P107", "llama", "0,1m,2@a1", {}, 2, ["map of layer 1, whose attention does not run before it"]),
    ("P107", "llama", "0,(1|2@a1)", {}, 2, ["map of layer 1", "choose an earlier layer"]),
    ("P108", "alternating", "0,1@a0", {}, 1, ["attention map of layer 0", "window 4", "a source of the same kind"]),
    ("P109", "llama", "0,1m@a0", {}, 1, ["attention map of layer 0", "only its mlp", "write 1m without @a"]),
    ("P109", "hybrid", "0,3,7@a0", {}, 0, ["layer 7 takes over", "linear_attention", "makes no map", "drop the @a"]),
    (
        "P128",
        "llama",
        "0-1,2@a1,3@a2",
        {},
        3,
        ["map of layer 2", "takes over a map itself", "name the layer"],
    ),
    ("P103", "llama", "0-3,4@a9", {}, 9, ["attention source 9 ", "0 to 7"]),
    ("P103", "llama", "0-3,4=9", {}, 9, ["tied layer 9 ", "0 to 7"]),
    ("P127", "llama", "0-3,4=4", {}, 4, ["layer 4 ", "matrices of layer 4, which are its own", "write 4"]),
    ("P127", "llama", "0,1=0,2=1", {}, 2, ["matrices of layer 1, which is tied itself", "name the layer whose"]),
    ("P127", "llama", "0-1,3=2,2=0", {}, 3, ["matrices of layer 2, which is tied itself"]),
    ("P127", "hybrid", "3,5=3", {}, 5, ["matrices of layer 3", "numbers", "of one structure"]),
    ("P110", "two_stacks", "decoder: 1-5", {}, 0, ["layer 0 must run first", "position bias", "begin the plan with 0"]),
    ("P110", "two_stacks", "decoder: 1,0", {}, 0, ["layer 0 must run first", "begin the plan with 0"]),
    ("P110", "two_stacks", "decoder: 0m,1", {}, 0, ["layer 0 must run first", "with its attention"]),
    ("P110", "two_stacks", "decoder: 0?g,1", {}, 0, ["layer 0 must run first", "without a gate"]),
    ("P110", "two_stacks", "decoder: (0|1),2", {}, 0, ["layer 0 must run first", "begin the plan with 0"]),
    ("P110", "two_stacks", "decoder: !e?g,0,1", {}, 0, ["layer 0 must run first", "begin the plan with 0"]),
    ("P111", "native_sharing", "0-2,4", {}, 4, ["layer 4 reads the state of layer 3", "keep 3 or drop 4"]),
    ("P111", "native_sharing", "0,5,3", {}, 5, ["layer 5 reads the state of layer 3", "keep 3 or drop 5"]),
    ("P111", "native_sharing", "0-2,3@2,4", {}, 4, ["layer 4 reads the state of layer 3", "state of its own"]),
    ("P111", "native_sharing", "0,(3|4)", {}, 4, ["layer 4 reads the state of layer 3", "keep 3 or drop 4"]),
    ("P112", "llama", "0-1,~2-3,4", {}, 2, ["map for decoder layers 2-3", "map-2-3.weight", "fit it first"]),
    ("P112", "llama", "0-1,~2-3,4", {"map-2-3.up": (16, 4)}, 2, ["map for decoder layers 2-3", "fit it first"]),
    ("P112", "llama", "0-1,~2-3,4", {"map-2-3.gate": (4, 16)}, 2, ["map for decoder layers 2-3", "fit it first"]),
    ("P112", "llama", "0,1:new", {"newer.q": (1,)}, 1, ["layer 1 ", "'new'", "remove :new"]),
    ("P112", "llama", "0,(1:new|2)", {}, 1, ["layer 1 ", "'new'", "remove :new"]),
    ("P112", "llama", "0,!e=head?g,1", {}, None, ["exit 'e'", "'head'", "remove =head"]),
    (
        "P113",
        "llama",
        "0-1,~2-3,4",
        {**MAP, "map-2-3.weigth": (16, 16)},
        2,
        ["map for decoder layers 2-3 does not fit", "map-2-3.weigth is no tensor of a map"],
    ),
    (
        "P113",
        "llama",
        "0,~2-3",
        {"map-2-3.weight": (16, 8)},
        2,
        ["layers 2-3", "[16, 8] instead of [16, 16]", "fit it on"],
    ),
    (
        "P113",
        "llama",
        "0,~2-3",
        MAP | {"map-2-3.bias": (1, 16)},
        2,
        ["layers 2-3", "[1, 16] instead of [16]", "fit it"],
    ),
    (
        "P113",
        "llama",
        "0,~2-3",
        {"map-2-3.down": (4, 16), "map-2-3.up": (16, 5)},
        2,
        ["layers 2-3", "[16, 5]", "[16, rank]", "fit it"],
    ),
    (
        "P113",
        "llama",
        "0,~2-3",
        {"map-2-3.down": (5, 16), "map-2-3.gate": (4, 16), "map-2-3.up": (16, 5)},
        2,
        ["layers 2-3", "map-2-3.gate is [4, 16]", "fit it"],
    ),
    ("P115", "llama", "0,!e,1-2", {}, None, ["exit 'e'", "so 1-2 behind it never runs", "remove"]),
    ("P115", "llama", "0,!e?g,1,!e?g", {}, None, ["two decoder exits", "'e'", "rename one"]),
    ("P116", "llama", "0,1/copy", {}, 1, ["layer 1 ", "'copy'", "no gate", "write 1?GATE/copy"]),
    ("P116", "llama", "0,1m?g/copy", {}, 1, ["layer 1 ", "'copy'", "stores no KV", "drop the fill"]),
    ("P116", "llama", "0,1@0?g/mask", {}, 1, ["layer 1 ", "'mask'", "stores no KV", "drop the fill"]),
    ("P116", "hybrid", "3,5?g/copy", {}, 5, ["layer 5 ", "stores no KV", "drop the fill"]),
    ("P119", "hybrid", "3,4?g/project", {}, 4, ["layer 4 ", "'project'", "recurrent state", "drop the fill"]),
]

BY_HAND = [
    ("P103", (Run(-1), Run(0)), -1, ["layer -1 ", "0 to 7"]),
    ("P114", (Run(0), Map(5, 3, "m")), 5, ["the map ~5-3 ", "write ~3-5"]),
    ("P118", (Run(0), Parallel((Run(1),))), None, ["(1)", "decoder", "two branches", "as in (7|8)"]),
]
"""What depth notation cannot even say."""

HELD = {"mlp.up.weight": (64, 16), "norm.weight": (16,)}
UNFIT = [
    (
        "2:new",
        {"new.mlp.gate.weight": (64, 16)},
        ["layer 2", "no tensor mlp.gate.weight", "as mlp.up.weight"],
    ),
    ("(1|2:new)", {"new.norm.weight": (8,)}, ["new.norm.weight is [8]", "layer 2 holds [16] there"]),
    ("2m:new", {"new.norm": (16,)}, ["new.norm is for", "layer 2", "no tensor norm", "mlp.up.weight"]),
]

ELSEWHERE = {"P102", "P104", "P117", "P120"}
"""Refused before there is a plan: see test_plan_file.py and test_edit.py."""


@pytest.mark.parametrize("name", MODELS)
def test_the_identity_has_no_problem(name: str) -> None:
    model = MODELS[name]
    plan = Plan.identity(model)
    assert check(plan, model) == []
    assert require(plan, model) is plan


@pytest.mark.parametrize(("name", "text", "shapes"), LEGAL, ids=[f"{n} {t}" for n, t, _ in LEGAL])
def test_a_legal_plan_has_no_problem(name: str, text: str, shapes: dict[str, tuple[int, ...]]) -> None:
    model = MODELS[name]
    assert check(plan_of(text, model), model, shapes) == []


@pytest.mark.parametrize(
    ("code", "name", "text", "shapes", "which", "words"), ILLEGAL, ids=[f"{c} {n} {t}" for c, n, t, *_ in ILLEGAL]
)
def test_a_problem_names_the_layer_and_the_remedy(
    code: str, name: str, text: str, shapes: dict[str, tuple[int, ...]], which: int | None, words: list[str]
) -> None:
    model = MODELS[name]
    problems = check(plan_of(text, model), model, shapes)
    assert [problem.code for problem in problems] == [code], "one mistake, one problem"
    assert (problems[0].stack, problems[0].layer) == ("decoder", which)
    assert [word for word in words if word not in problems[0].message] == []
    assert str(problems[0]) == f"{code}: {problems[0].message}"


@pytest.mark.parametrize(("code", "steps", "which", "words"), BY_HAND, ids=[row[0] for row in BY_HAND])
def test_steps_made_by_hand_are_checked_too(
    code: str, steps: tuple[Run | Map | Parallel | Exit, ...], which: int | None, words: list[str]
) -> None:
    problems = check(Plan.identity(llama()).with_steps(steps), llama())
    assert [(problem.code, problem.layer) for problem in problems] == [(code, which)]
    assert [word for word in words if word not in problems[0].message] == []


@pytest.mark.parametrize(("text", "shapes", "words"), UNFIT, ids=[row[0] for row in UNFIT])
def test_own_tensors_of_a_run_must_fit_its_layer(
    text: str, shapes: dict[str, tuple[int, ...]], words: list[str]
) -> None:
    plan = plan_of(f"0,{text},3-7", llama())
    assert check(plan, llama(), shapes) == [], "a Spec knows no tensors"
    (problem,) = check(plan, llama(), shapes, lambda stack, index: HELD)
    assert (problem.code, problem.stack, problem.layer) == ("P129", "decoder", 2)
    assert [word for word in words if word not in problem.message] == []
    right = plan_of("0,1:new,2a:new,3", llama())
    assert check(right, llama(), {f"new.{n}": s for n, s in HELD.items()}, lambda stack, index: HELD) == []


def test_every_code_is_earned_by_some_plan() -> None:
    text = importlib.import_module("shoal.plan.check").__doc__ or ""
    assert set(re.findall(r"P1\d\d", text)) == {row[0] for row in ILLEGAL} | {row[0] for row in BY_HAND} | ELSEWHERE | {
        "P101",
        "P129",
    }


@pytest.mark.parametrize(
    "other",
    [alternating(), hybrid(), two_stacks(), spec("llama", stack("decoder", *(layer(i) for i in range(9))))],
    ids=["kinds", "hybrid", "stacks", "depth"],
)
def test_a_plan_for_another_model_is_refused(other: Spec) -> None:
    problems = check(plan_of("0-3"), other)
    assert [problem.code for problem in problems] == ["P101"]
    assert "made for another model (llama with 8 decoder layers, sha256:" in problems[0].message
    assert f"not for {other.family} with " in problems[0].message
    assert "make a plan for this model" in problems[0].message


def test_depths_are_compared_even_when_the_fingerprint_agrees() -> None:
    plan = Plan.identity(llama())
    plan = replace(plan, base=replace(plan.base, depths=(("decoder", 9),)))
    assert [problem.code for problem in check(plan, llama())] == ["P101"]


def test_all_problems_of_all_stacks_are_found() -> None:
    model = two_stacks()
    problems = check(plan_of("encoder: 4; decoder: 1,2/copy,3:w", model), model)
    assert [(problem.code, problem.stack, problem.layer) for problem in problems] == [
        ("P103", "encoder", 4),
        ("P110", "decoder", 0),
        ("P116", "decoder", 2),
        ("P112", "decoder", 3),
    ]
    with pytest.raises(PlanError, match=r"P103: layer 4 does not exist.* \(and 3 more: P110, P116, P112\)$"):
        require(plan_of("encoder: 4; decoder: 1,2/copy,3:w", model), model)


def test_one_problem_is_told_without_a_count() -> None:
    with pytest.raises(PlanError) as caught:
        require(plan_of("0-7m"), llama())
    assert caught.value.code == "P106"
    assert "more" not in str(caught.value)


def test_the_parts_note_says_why_there_are_no_parts() -> None:
    whole = stack("decoder", *(replace(layer(i), attention=None, mlp=None) for i in range(2)))
    model = replace(spec("odd", whole), parts_note="its layers mix attention and mlp")
    problems = check(plan_of("0,1a", model), model)
    assert [problem.code for problem in problems] == ["P105"]
    assert "its layers mix attention and mlp; run the whole layer (1)" in problems[0].message


def test_a_stack_without_any_kv_counts_no_tokens() -> None:
    model = two_stacks()
    assert check(plan_of("encoder: 0-3m", model), model) == []


def test_a_source_with_another_value_size_is_refused() -> None:
    wide = replace(layer(1), kv=replace(layer(1).kv, value_dim=8))
    model = spec("odd", stack("decoder", layer(0), wide))
    (problem,) = check(share_kv(Plan.identity(model), 1, 0), model)
    assert problem.code == "P108"
    assert "2 x (4 + 8)" in problem.message
    assert "2 x (4 + 4)" in problem.message


def test_the_spec_names_its_stacks() -> None:
    model = two_stacks()
    assert model.stack().name == "decoder"
    assert model.stack("encoder").depth == 4
    assert spec("vit", stack("vision", layer(0))).stack().name == "vision"
    with pytest.raises(PlanError, match=r"P102: .*'text'; it has encoder, decoder"):
        model.stack("text")


def test_the_fingerprint_is_of_the_structure_alone() -> None:
    model = llama()
    assert model.fingerprint == llama().fingerprint
    assert replace(model, probed=False, parts_note="x").fingerprint == model.fingerprint
    others = [alternating(), hybrid(), two_stacks(), replace(model, vocab=129), replace(model, family="qwen")]
    assert len({model.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert model.to_dict()["fingerprint"] == model.fingerprint


def test_matrices_are_compared_by_name_and_shape_where_they_are_known() -> None:
    """As many numbers in another shape do not fit; vectors are not asked, nor what only one of the two has."""
    shapes = {0: {"mlp.up": (4, 8), "norm": (8,)}, 1: {"mlp.up": (8, 4), "norm": (9,), "bias.of.all": (2, 2)}}

    def layers(_: str, index: int) -> dict[str, tuple[int, ...]]:
        return shapes[index % 2]

    plan = parse_plan("0,1=0", Plan.identity(llama()))
    (problem,) = check(plan, llama(), layers=layers)
    assert (problem.code, problem.layer) == ("P127", 1)
    assert "mlp.up is [8, 4] in layer 1 and [4, 8] in layer 0" in problem.message
    assert check(parse_plan("0,2=0", Plan.identity(llama())), llama(), layers=layers) == []
    assert check(parse_plan("0,1a=0", Plan.identity(llama())), llama(), layers=layers) == []
