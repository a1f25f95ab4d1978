"""Other tools' plans: read as people write them, written as those tools read them, and refused where they cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.errors import NotationError, PlanError, ShoalError
from shoal.examples import FormatExamples
from shoal.exchange._format import Format
from shoal.plan import Base, Plan, Run, Spec, parse_plan
from shoal.registry import entries, get

from .specs import FULL, layer, llama, plan_of, spec, stack, two_stacks
from .strategies import json_values, plans

EXAMPLES: dict[str, FormatExamples] = {name: entry.examples for name, entry in entries("exchange").items()}
OTHERS = [name for name, own in EXAMPLES.items() if own.says != "everything"]
DEPTH = 8


@cache
def form(name: str) -> Format:
    found = get("exchange", name).load()()
    assert isinstance(found, Format)
    return found


def servable() -> Spec:
    """`llama()` with an attention of Llama's four matrices and an mlp of 256: sizes that nemotron-nas can state."""
    first = layer(0)
    assert first.attention is not None
    assert first.mlp is not None
    attention = replace(first.attention, params=2 * 16 * (16 + 2 * 4))
    mlp = replace(first.mlp, params=3 * 16 * 256)
    layers = (replace(first, index=i, attention=attention, mlp=mlp) for i in range(DEPTH))
    return spec("llama", stack("decoder", *layers))


WHOLE = Plan.identity(servable(), source="me/base")


def read(name: str, text: str | bytes) -> str:
    return str(form(name).read(text, WHOLE))


def refusal(name: str, text: str | bytes) -> str:
    with pytest.raises(NotationError) as caught:
        form(name).read(text, WHOLE)
    return str(caught.value)


def written(name: str, notation: str) -> str:
    return form(name).write(parse_plan(notation, WHOLE), servable())


def unsayable(name: str, notation: str) -> str:
    with pytest.raises(NotationError) as caught:
        written(name, notation)
    return str(caught.value)


def slices(*ranges: str, more: str = "merge_method: passthrough", model: str = "org/base@main") -> str:
    body = "\n".join(f"- sources:\n  - model: {model}\n    layer_range: {found}" for found in ranges)
    return f"slices:\n{body}\n{more}\n"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("mergekit", slices("[0, 3]", "[5, 8]", more="merge_method: passthrough\ndtype: bfloat16"), "0-2,5-7"),
        ("mergekit", slices("[0, 6]", "[2, 8]"), "0-5,2-7"),
        ("mergekit", slices("[0, 1]", "[0, 1]", "[7, 8]"), "0x2,7"),
        ("shortgpt", "[5, 6, 2]", "0-1,3-4,7"),
        ("shortgpt", "[]", "0-7"),
        ("pruneme", "[1, 8]", "1-6"),
        ("pruneme", "block_start,block_end,average_distance\r\n1,3,0.4\r\n5,7,0.1\r\n6,8,0.1\r\n", "0-4,7"),
        ("llama-quantize", "3,5\n", "0-2,4,6-7"),
        ("llama-quantize", "--prune-layers 3, 5", "0-2,4,6-7"),
        ("llm-drop", '{"model_type": "llama", "drop_attn_list": [3, 4], "drop_mlp_list": [4]}', "0-2,3m,5-7"),
        ("llm-drop", json.dumps({"drop_attn_list": [i == 3 for i in range(8)], "drop_mlp_list": None}), "0-2,3m,4-7"),
        ("swift", '{"attention": [3, 4], "mlp": [4, 6]}', "0-2,3m,5,6a,7"),
        ("swift", '{"base-13b": {"summaries": {"attention": [], "mlp": [0]}}}', "0a,1-7"),
        ("block-pruner", '{"1": [["mha", 3]], "2": [["mha", 3], ["mlp", 3]]}', "0-2,4-7"),
        ("block-pruner", '{"10": [["mlp", 1], ["mha", 3]], "9": [["mha", 0]]}', "0,1a,2,3m,4-7"),
        ("block-pruner", '[["mlp", 1]]', "0,1a,2-7"),
        ("notation", "0-3,5a\n", "0-3,5a"),
    ],
)
def test_read_as_people_write_it(name: str, text: str, expected: str) -> None:
    assert read(name, text) == expected
    assert read(name, text.encode()) == expected


def test_what_is_written_is_what_the_tools_expect() -> None:
    assert yaml.safe_load(written("mergekit", "0-2,5-7")) == {
        "slices": [
            {"sources": [{"model": "me/base", "layer_range": [0, 3]}]},
            {"sources": [{"model": "me/base", "layer_range": [5, 8]}]},
        ],
        "merge_method": "passthrough",
    }
    assert "layer_range: [0, 3]" in written("mergekit", "0-2,5-7")
    assert written("shortgpt", "0-2,5-7") == "[3, 4]\n"
    assert written("pruneme", "0-2,5-7") == "[4, 5]\n"
    assert written("llama-quantize", "0-2,5-7") == "3,4\n"
    assert json.loads(written("llm-drop", "0-2,3m,5-7")) == {"drop_attn_list": [3, 4], "drop_mlp_list": [4]}
    assert json.loads(written("block-pruner", "0-2,3m,5-7")) == {"3": [["mha", 3], ["mha", 4], ["mlp", 4]]}
    assert json.loads(written("swift", "0-2,3m,5-7")) == {"base": {"attention": [3, 4], "mlp": [4]}}


def test_block_configs_state_the_sizes_of_what_runs() -> None:
    blocks = json.loads(written("nemotron-nas", "0-2,3m,5-7"))["block_configs"]
    whole = {"no_op": False, "replace_with_linear": False}
    none = {"no_op": True, "replace_with_linear": False}
    mlp = {**whole, "ffn_mult": 24.0}
    assert len(blocks) == DEPTH
    assert blocks[0] == {"attention": {**whole, "n_heads_in_group": 2}, "ffn": mlp}
    assert blocks[3] == {"attention": {**none, "n_heads_in_group": None}, "ffn": mlp}
    assert blocks[4]["ffn"] == {**none, "ffn_mult": None}
    assert -(-int(2 * 24.0 * 16 / 3) // 256) * 256 == 256  # as DeciLM computes the width of the mlp


def test_block_configs_are_read_with_the_fields_of_released_checkpoints() -> None:
    attention = {"n_heads_in_group": 8, "no_op": False, "num_sink_tokens": None, "replace_with_linear": False}
    blocks = [{"attention": dict(attention), "ffn": {"ffn_mult": 2.625, "no_op": False}} for _ in range(DEPTH)]
    blocks[2]["attention"].update(no_op=True, n_heads_in_group=None)
    blocks[6]["ffn"].update(no_op=True, ffn_mult=None)
    assert read("nemotron-nas", json.dumps({"block_configs": blocks, "hidden_size": 8})) == "0-1,2m,3-5,6a,7"
    assert read("nemotron-nas", json.dumps(blocks)) == "0-1,2m,3-5,6a,7"
    newer = [
        {"attention": dict(attention), "ffn": {"intermediate_size": 256, "hidden_act": "silu"}} for _ in range(DEPTH)
    ]
    newer[1]["ffn"] = {"no_op": True, "intermediate_size": None}
    assert read("nemotron-nas", json.dumps(newer)) == "0,1a,2-7"
    newer[3]["ffn"]["intermediate_size"] = 512
    assert "a plan cannot say intermediate_size 512 in layer 3 beside 256" in refusal("nemotron-nas", json.dumps(newer))
    blocks[5]["ffn"]["ffn_mult"] = 1.0
    assert "N103: nemotron-nas: a plan cannot say ffn_mult 1.0 in layer" in refusal("nemotron-nas", json.dumps(blocks))
    blocks[5]["attention"]["replace_with_linear"] = True
    assert "'replace_with_linear' in the attention of layer 5" in refusal("nemotron-nas", json.dumps(blocks))
    assert "N106: block_configs has 7 entries, the model has 8" in refusal("nemotron-nas", json.dumps(blocks[1:]))


def test_mergekit_keeps_the_name_of_the_model() -> None:
    plan = form("mergekit").read(slices("[0, 3]"), WHOLE)
    assert plan.base.source == "org/base@main"
    assert "model: org/base@main" in form("mergekit").write(plan, None)
    with pytest.raises(NotationError, match="N105: mergekit needs the model's name"):
        form("mergekit").write(plan_of("0-3"), None)


METHOD = "merge_method: passthrough"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (slices("[0, 3]", more="merge_method: slerp"), "N103: mergekit: a plan cannot say merge_method 'slerp'"),
        (slices("[0, 3]", more="merge_method: slerp"), "or run mergekit and give the model that it makes"),
        (slices("[0, 3]", more=""), "merge_method None"),
        (slices("[0, 3]", more=f"{METHOD}\nparameters: {{scale: 0.5}}"), "'parameters' ('scale') in the file"),
        (slices("[0, 3]\n    parameters: {scale: [{value: 0}]}", more=METHOD), "'parameters' ('scale') in slice 0"),
        (slices("[0, 3]") + slices("[3, 8]", model="b")[8:].split("merge_m")[0], "YAML"),
        (slices("[0, 3]", "[3, 4]\n  - model: b\n    layer_range: [3, 4]"), "2 sources in slice 1"),
        (slices("[0, 3]", more=f"{METHOD}\nbase_model: other"), "the models 'org/base@main' and 'other'"),
        (f"models: [{{model: a}}]\n{METHOD}", "'models' in the file"),
        (slices("[4, 4]"), "N102: slice 0: layer_range [4, 4] holds no layer, as its end is left out; write [4, 5]"),
        (slices("[0, 9]"), "its layers are 0 to 7 and the end is left out, so it is at most 8"),
        (slices("[0, 8.0]"), "layer_range must be two layer numbers"),
        (slices("[0, 3]", model="{path: a}"), "slice 0 has the model a mapping; write its name as text"),
        (METHOD, "slices is None; expected a list"),
        (f"slices: []\n{METHOD}", "no slice"),
        ("a: &x [1]\nb: *x", "has the alias *x"),
        ("[" * 30, "N101"),
        ("{a: 2001-99-99}", "is not YAML (month must be in 1..12"),
        ("!!python/object/apply:os.system [ls]", "is not YAML (line 1, column 1: could not determine a constructor"),
        ("slices:\n\t- sources: []\n", "is not YAML (line 2, column 1: found character '\\t' that cannot start"),
        ("slices: [a, b\nx: y\n", "is not YAML (line 2, column"),
    ],
)
def test_what_mergekit_can_say_and_a_plan_cannot(text: str, said: str) -> None:
    assert said in refusal("mergekit", text)


def test_two_models_are_named() -> None:
    text = slices("[0, 3]", "[3, 8]").replace("org/base@main", "b", 1)
    assert "N103: mergekit: a plan cannot say the models 'b' and 'org/base@main'; write slices of one" in refusal(
        "mergekit", text
    )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("shortgpt", "[8]", "N102: the shortgpt list names layer 8; its layers are 0 to 7"),
        ("pruneme", "[0]", "N102: the pruneme list (counted from 1) names layer 0; its layers are 1 to 8"),
        ("shortgpt", "[true]", "names layer True"),
        ("shortgpt", "[1, 1]", "names layer 1 twice"),
        ("shortgpt", "{}", "N101: the shortgpt list is a mapping; expected a list of layers"),
        ("llama-quantize", "3-5", "N101: cannot read '3-5' as a llama-quantize list; write layers as in 3,7,11"),
        ("llama-quantize", "", "N101"),
        (
            "pruneme",
            "block_start,block_end,average_distance\n7,9,0.1\n",
            "N102: the pruneme file has the span '7' to '9'",
        ),
        ("pruneme", "block_start,block_end,average_distance\n1,3,nan\n", "N102"),
        ("pruneme", "block_start,block_end,average_distance\n", "N101: the pruneme file has no span"),
        ("pruneme", "block_start,block_end\n1,2\n", "N101: cannot read the pruneme file (KeyError)"),
        ("llm-drop", '{"drop_attn_list": [true, false]}', "N106: drop_attn_list says true or false for 2 layers"),
        ("llm-drop", "{}", "has neither drop_attn_list nor drop_mlp_list"),
        ("llm-drop", '{"drop_attn_list": [], "num_hidden_layers": 32}', "N106: the llm-drop file is for 32 layers"),
        ("swift", '{"a": {"mlp": [1]}, "b": {"mlp": [2]}}', "N103: the swift file holds 2 plans ('a', 'b'); keep one"),
        ("block-pruner", "{}", "N101: the block-pruner file must map numbers of parts to lists"),
        ("block-pruner", '{"mha": [1]}', "N101: the block-pruner file must map numbers of parts to lists"),
        ("block-pruner", '{"1": {}}', "N101: list 1 is a mapping"),
        ("block-pruner", '{"1": [["ffn", 1]]}', "N101: list 1 holds 'ffn'"),
        ("block-pruner", '[["mha", 8]]', "N102: mha in the block-pruner list names layer 8"),
        ("block-pruner", '[["mha", 1], ["mha", 1]]', "names layer 1 twice"),
        ("swift", "[]", "no list called attention or mlp"),
        ("swift", '{"a": {"mlp": [9]}}', "the list 'mlp' of the swift file ('a') names layer 9"),
        ("nemotron-nas", "{}", "no list block_configs"),
        ("nemotron-nas", json.dumps([{}] * DEPTH), "block_configs[0] has no attention with a true or false no_op"),
        ("plan-json", "{}", "not a plan of the format"),
        ("notation", b"\xff", "is not UTF-8 text"),
    ],
)
def test_a_refused_text_names_what_and_where(name: str, text: str, said: str) -> None:
    assert said in refusal(name, text)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("bomb", ["[" * 100_000, '{"a":' * 100_000, "[" * 5_000_000, "9" * 10_000], ids=len)
def test_bombs_are_refused_at_once(name: str, bomb: str) -> None:
    assert "N10" in refusal(name, bomb)


@pytest.mark.parametrize(
    ("name", "notation", "said"),
    [
        ("shortgpt", "0-2,3a,5-7", "N104: shortgpt cannot say 3a (step 3, 0-based), it says only which layers are"),
        ("shortgpt", "0-2,3a,5-7", "the nearest plan is 0-3,5-7"),
        ("llama-quantize", "0-2,1", "llama-quantize cannot say 1 (step 3, 0-based)"),
        ("llama-quantize", "0-7", "it removes no layer; leave --prune-layers out"),
        ("swift", "7-0", "the nearest plan is 0-7"),
        ("block-pruner", "0-7", "it removes nothing"),
        ("llm-drop", "0-2,~3-5,6-7", "cannot say ~3-5 (step 3, 0-based)"),
        ("llm-drop", "0-2,3a,3m", "the nearest plan is 0-3"),
        ("llm-drop", "!early", "keep at least one layer"),
        ("nemotron-nas", "0-2,(3|4),5-7", "the nearest plan is 0-7"),
        ("mergekit", "0-2,3m,5-7", "mergekit cannot say 3m (step 3, 0-based), it says whole layers"),
        ("mergekit", "0-2,3@2,5-7", "the nearest plan is 0-3,5-7"),
        ("mergekit", "0x5000", "use a plan with fewer slices"),
    ],
)
def test_what_a_format_cannot_say(name: str, notation: str, said: str) -> None:
    assert said in unsayable(name, notation)


def test_another_stack_must_be_whole() -> None:
    plan = plan_of("encoder: 0-1; decoder: 0-4", two_stacks())
    with pytest.raises(NotationError, match="cannot say encoder: 0-1, it knows the decoder alone"):
        form("shortgpt").write(plan, None)
    assert form("shortgpt").write(plan_of("0-4", two_stacks()), two_stacks()) == "[5]\n"


def test_nemotron_needs_a_layer_like_llamas() -> None:
    first, *rest = servable().stacks[0].layers
    assert first.mlp is not None
    sliding = replace(first, kv=replace(FULL, kind="sliding", window=4))
    narrow = replace(first, mlp=replace(first.mlp, params=3 * 16 * 200))
    for model, why in (
        (llama(), "layer 0: its attention has biases, norms or other weights"),
        (spec("llama", stack("decoder", sliding, *rest)), "its KV sliding"),
        (spec("llama", stack("decoder", narrow, *rest)), "no gated one with a multiple of 256"),
        (spec("gemma", *servable().stacks), "N104: nemotron-nas cannot say layers of gemma"),
    ):
        with pytest.raises(NotationError, match=why):
            form("nemotron-nas").write(plan_of("0-6", model), model)
    with pytest.raises(NotationError, match="N105: nemotron-nas states sizes"):
        form("nemotron-nas").write(plan_of("0-6"), None)
    with pytest.raises(PlanError, match="P101"):
        form("nemotron-nas").write(plan_of("0-6"), spec("mistral", *servable().stacks))


def test_a_plan_of_another_model_is_refused() -> None:
    text = form("plan-json").write(plan_of("encoder: 0-1", two_stacks()), None)
    assert "N106: this plan.json was made for another model" in refusal("plan-json", text)


parts = st.sets(st.integers(0, DEPTH - 1), max_size=5)


def dropped(attention: set[int], mlp: set[int]) -> Plan:
    steps = (
        Run(i, "mlp" if i in attention else "attention" if i in mlp else "layer")
        for i in range(DEPTH)
        if i not in attention & mlp
    )
    return WHOLE.with_steps(tuple(steps))


@given(parts, parts)
@settings(max_examples=50)
def test_removed_parts_come_back(attention: set[int], mlp: set[int]) -> None:
    plan = dropped(attention, mlp)
    for name in (name for name, own in EXAMPLES.items() if own.says in ("removed parts", "everything")):
        if not (attention | mlp or EXAMPLES[name].whole):
            continue
        assert form(name).read(form(name).write(plan, servable()), WHOLE) == plan
    whole = dropped(mlp, mlp)
    for name in (name for name, own in EXAMPLES.items() if own.says == "removed layers"):
        if mlp or EXAMPLES[name].whole:
            assert form(name).read(form(name).write(whole, None), WHOLE) == whole


@given(st.lists(st.integers(0, DEPTH - 1), min_size=1, max_size=20), st.text(min_size=1, max_size=10))
@settings(max_examples=50)
@example([0, 1, 1, 2, 7, 6], "*a: [&b] #\n\x85'\"")
def test_any_order_of_layers_comes_back(order: list[int], source: str) -> None:
    plan = replace(WHOLE.with_steps(tuple(map(Run, order))), base=replace(WHOLE.base, source=source))
    for name in (name for name, own in EXAMPLES.items() if own.says in ("layers in any order", "everything")):
        again = form(name).read(form(name).write(plan, None), WHOLE)
        assert again == plan, name
        if name != "notation":  # which holds no name of a model
            assert again.base.source == source, name


def said(name: str, plan: Plan) -> str | None:
    """What the format writes; None when it refuses as it should."""
    try:
        return form(name).write(plan, None)
    except NotationError as error:
        if error.code not in ("N104", "N105"):
            raise
        return None


@given(plans)
def test_every_plan_comes_back_or_is_refused_with_a_reason(plan: Plan) -> None:
    for name in EXAMPLES:
        text = said(name, plan)
        if text is None:
            assert name not in ("plan-json", "notation")
            continue
        base = Base(plan.base.family, plan.base.fingerprint, plan.base.depths, plan.base.source)
        whole = Plan(base, tuple((stack, tuple(map(Run, range(depth)))) for stack, depth in base.depths))
        assert form(name).read(text, whole) == plan


def survives(name: str, text: str | bytes) -> None:
    try:
        found = form(name).read(text, WHOLE)
    except ShoalError:
        return
    assert isinstance(found, Plan)


@given(st.binary(max_size=60) | st.text(max_size=60))
@example("=: =")
@example("? [a]\n: b")
@example("<<: {a: 1}")
@example(b"\xef\xbb\xbf[1]")
@example("!!timestamp x")
@example("!!float ''")
@example("!!bool x")
@example("!!int ''")
@example("1:1" * 2)
@example("slices: [{sources: [{model: a, layer_range: [0x" + "f" * 5000 + ", 1]}]}]\nmerge_method: passthrough")
def test_any_bytes_give_a_plan_or_a_shoal_error(text: str | bytes) -> None:
    for name in EXAMPLES:
        survives(name, text)


keys = st.sampled_from(
    [
        *("slices", "sources", "model", "layer_range", "merge_method", "parameters"),
        *("drop_attn_list", "drop_mlp_list", "num_hidden_layers", "attention", "mlp"),
        *("ffn", "no_op", "block_configs", "n_heads_in_group"),
    ]
)
shapes = st.recursive(
    json_values | st.sampled_from(["passthrough", 3]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=8,
)


@given(shapes)
def test_any_data_gives_a_plan_or_a_shoal_error(data: object) -> None:
    for name in OTHERS:
        survives(name, json.dumps(data))
        survives(name, json.dumps([data] * DEPTH))
