"""What a plan costs, against numbers worked out by hand and attention counted pair by pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.plan import Cost, KVSpec, Plan, Shape, Spec, cost
from shoal.plan.price import FIGURES, head_in_layers, layers_run
from shoal.plan.steps import runs
from shoal.report.facts import PlannedStack
from unit.specs import (
    HEAD_FLOPS,
    LAYER_FLOPS,
    LAYER_PARAMS,
    OTHER_PARAMS,
    WIDTH,
    alternating,
    hybrid,
    layer,
    llama,
    native_sharing,
    plan_of,
    spec,
    stack,
    two_stacks,
)

SHAPE = Shape(batch=3, prompt=10, context=20)


def _cost(text: str, model: Spec | None = None, shape: Shape = SHAPE) -> Cost:
    model = model or llama()
    return cost(plan_of(text, model), model, shape)


def _pairs(tokens: int, window: int | None = None) -> int:
    return sum(1 for query in range(tokens) for key in range(query + 1) if window is None or query - key < window)


def test_the_whole_model_in_plain_numbers() -> None:
    assert _cost("0-7") == Cost(
        params=21_776,  # 8 x 2208 + 4112
        written_params=21_776,
        layer_runs=8,
        half_runs=0,
        prefill_flops=1_141_248,  # 3 x (8 x (4352 x 10 + 2 x 32 x 55) + 4096)
        decode_flops=147_456,  # 3 x (8 x (4352 + 2 x 32 x 20) + 4096)
        kv_per_token=128,  # 8 x 16
        kv_elements=7_680,  # 3 x 20 x 128
        shape=SHAPE,
    )


def test_the_identity_costs_the_spec() -> None:
    for model in (llama(), alternating(), hybrid(), two_stacks(), native_sharing()):
        whole = cost(Plan.identity(model), model)
        assert whole.params == whole.written_params == model.params
        assert whole.shape == Shape(batch=1, prompt=512, context=512)
        assert whole.to_dict()["shape"] == {"batch": 1, "prompt": 512, "context": 512}


def test_dropped_layers_cost_nothing() -> None:
    found = _cost("0-1,4-6")
    assert found.params == found.written_params == OTHER_PARAMS + 5 * LAYER_PARAMS
    assert found.layer_runs == 5
    assert found.prefill_flops == 3 * (5 * (LAYER_FLOPS * 10 + 2 * WIDTH * _pairs(10)) + HEAD_FLOPS)
    assert found.decode_flops == 3 * (5 * (LAYER_FLOPS + 2 * WIDTH * 20) + HEAD_FLOPS)
    assert (found.kv_per_token, found.kv_elements) == (80, 3 * 20 * 80)


def test_a_repeated_layer_is_stored_once_and_written_often() -> None:
    found = _cost("0,1x3")
    assert found.params == OTHER_PARAMS + 2 * LAYER_PARAMS
    assert found.written_params == OTHER_PARAMS + 4 * LAYER_PARAMS
    assert found.layer_runs == 4
    assert found.kv_per_token == 64
    assert found.decode_flops == _cost("0-3").decode_flops
    assert found.prefill_flops == _cost("0-3").prefill_flops


def test_attention_alone_and_mlp_alone() -> None:
    attention, mlp = _cost("0,1a"), _cost("0,1m")
    assert attention.params == OTHER_PARAMS + 2208 + 640 + 32
    assert mlp.params == OTHER_PARAMS + 2208 + 1536 + 32
    assert attention.written_params == mlp.written_params == OTHER_PARAMS + 2 * 2208
    assert (attention.layer_runs, attention.half_runs) == (mlp.layer_runs, mlp.half_runs) == (1, 1)
    one = _cost("0")
    assert attention.decode_flops - one.decode_flops == 3 * (1280 + 2 * WIDTH * 20)
    assert attention.prefill_flops - one.prefill_flops == 3 * (1280 * 10 + 2 * WIDTH * 55)
    assert mlp.decode_flops - one.decode_flops == 3 * 3072
    assert mlp.prefill_flops - one.prefill_flops == 3 * 3072 * 10
    assert (attention.kv_per_token, mlp.kv_per_token) == (32, 16)


def test_both_halves_are_one_layer_in_storage() -> None:
    halves, whole = _cost("0,1a,1m"), _cost("0-1")
    assert halves.params == whole.params
    assert halves.written_params == OTHER_PARAMS + 3 * LAYER_PARAMS, "a stock checkpoint holds whole layers"
    assert (halves.layer_runs, halves.half_runs) == (1, 2)
    assert halves.prefill_flops == whole.prefill_flops
    assert halves.decode_flops == whole.decode_flops
    assert halves.kv_elements == whole.kv_elements


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0,1a,1m", 2),
        ("0,2a,1m", 2),
        ("1a,0m,2a,0m,3m", 3),
        ("0m,1a", 2),
        ("0a,1a,1m,2m", 3),
        ("0a,~1-2,3m", 2),
        ("0a,1m:n", 1),
    ],
)
def test_an_attention_and_the_mlp_behind_it_are_one_layer_of_a_stock_checkpoint(text: str, layers: int) -> None:
    """Where the mlp reads what the attention wrote, and the two mlps are built alike."""
    model = llama()
    (stack,) = model.stacks
    chained = tuple(replace(one, mlp_reads_attention=True) for one in stack.layers)
    joined = replace(model, stacks=(replace(stack, layers=chained),))
    maps = 16 * 17 * text.count("~")
    assert _cost(text, joined).written_params == OTHER_PARAMS + layers * LAYER_PARAMS + maps
    halves = len([piece for piece in text.split(",") if piece[0] != "~"])
    assert _cost(text, model).written_params == OTHER_PARAMS + halves * LAYER_PARAMS + maps
    assert replace(_cost(text, joined), written_params=0) == replace(_cost(text, model), written_params=0)
    mlp = joined.stacks[0].layers[1].mlp
    assert mlp is not None
    wider = replace(chained[1], mlp=replace(mlp, params=mlp.params + 1), params=chained[1].params + 1)
    mixed = replace(model, stacks=(replace(stack, layers=(chained[0], wider, *chained[2:])),))
    assert _cost("0,2a,1m", mixed).written_params == OTHER_PARAMS + 3 * LAYER_PARAMS + 1


def test_a_map_is_one_matrix_and_a_bias() -> None:
    found, without = _cost("0-1,~2-3,4"), _cost("0-1,4")
    assert found.params - without.params == found.written_params - without.written_params == 16 * 17
    assert found.decode_flops - without.decode_flops == 3 * 2 * 16 * 16
    assert found.prefill_flops - without.prefill_flops == 3 * 2 * 16 * 16 * 10
    assert (found.layer_runs, found.kv_elements) == (without.layer_runs, without.kv_elements)
    assert _cost("0-1,~2-3:m,4,~5-6:m").params == found.params, "two maps with one name share their storage"


def test_a_layer_that_reads_kv_stores_none_and_computes_the_same() -> None:
    found, whole = _cost("0-2,3@2"), _cost("0-3")
    assert (found.kv_per_token, found.kv_elements) == (48, 3 * 20 * 48)
    assert replace(found, kv_per_token=64, kv_elements=3 * 20 * 64) == whole


def test_new_weights_are_storage_of_their_own() -> None:
    assert _cost("0,1:new").params == _cost("0,1").params
    assert _cost("0,0:new").params == OTHER_PARAMS + 2 * LAYER_PARAMS
    assert _cost("0,1:new,2:new").params == OTHER_PARAMS + 2 * LAYER_PARAMS
    assert _cost("0,1:0").params == OTHER_PARAMS + 2 * LAYER_PARAMS, "the name 0 is not the layer 0"
    model = two_stacks()
    assert _cost("encoder: 0:new; decoder: 0:new", model).params == OTHER_PARAMS + LAYER_PARAMS


def test_groups_gates_and_exits() -> None:
    assert _cost("0,(1|2),3") == _cost("0-3")
    assert _cost("0,1?g/copy,!e?g,2-3") == _cost("0-3")


def test_sliding_layers_see_and_keep_a_window() -> None:
    found = _cost("0-1", alternating())  # layer 0: window 4; layer 1: full
    pairs = _pairs(10, 4) + _pairs(10)
    assert _pairs(10, 4) == 1 + 2 + 3 + 7 * 4
    assert found.prefill_flops == 3 * (2 * LAYER_FLOPS * 10 + 2 * WIDTH * pairs + HEAD_FLOPS)
    assert found.decode_flops == 3 * (2 * LAYER_FLOPS + 2 * WIDTH * (4 + 20) + HEAD_FLOPS)
    assert found.kv_per_token == 32
    assert found.kv_elements == 3 * 16 * (4 + 20)


@settings(max_examples=60)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 14) | st.none())
def test_attention_is_counted_pair_by_pair(prompt: int, context: int, window: int | None) -> None:
    one = replace(layer(0), kv=replace(layer(0).kv, window=window), flops=0)
    model = replace(spec("odd", stack("decoder", one)), head_flops=0)
    found = cost(Plan.identity(model), model, Shape(1, prompt, context))
    seen = context if window is None else min(context, window)
    assert found.prefill_flops == 2 * WIDTH * _pairs(prompt, window)
    assert found.decode_flops == 2 * WIDTH * seen
    assert found.kv_elements == 16 * seen


def test_keys_and_values_may_differ_in_size() -> None:
    kv = KVSpec("full", heads=2, key_dim=4, value_dim=6, state=5)
    assert kv.per_token == 2 * (4 + 6)
    assert kv.elements(7) == 7 * 20 + 5
    assert replace(kv, window=3).elements(7) == 3 * 20 + 5
    assert replace(kv, window=9).elements(7) == 7 * 20 + 5


def test_recurrent_layers_hold_a_constant_state() -> None:
    found = _cost("0,3,5", hybrid())  # recurrent, attention, a bare mlp
    assert found.kv_per_token == 16
    assert found.kv_elements == 3 * (96 + 16 * 20)
    assert found.prefill_flops == 3 * (10 * (2 * LAYER_FLOPS + 3072) + 2 * WIDTH * _pairs(10) + HEAD_FLOPS)
    assert found.decode_flops == 3 * (2 * LAYER_FLOPS + 3072 + 2 * WIDTH * 20 + HEAD_FLOPS)
    assert found.params == OTHER_PARAMS + 2 * LAYER_PARAMS + 1536
    assert _cost("0x2,3", hybrid()).kv_elements == 3 * (2 * 96 + 16 * 20), "each run has a state of its own"


def test_an_encoder_runs_once_and_sees_the_whole_prompt() -> None:
    found = _cost("encoder: 0-1; decoder: 0", two_stacks())
    assert found.params == found.written_params == OTHER_PARAMS + 3 * LAYER_PARAMS
    assert found.layer_runs == 3
    pairs = 2 * 10 * 10 + _pairs(10)
    assert found.prefill_flops == 3 * (3 * LAYER_FLOPS * 10 + 2 * WIDTH * pairs + HEAD_FLOPS)
    assert found.decode_flops == 3 * (LAYER_FLOPS + 2 * WIDTH * 20 + HEAD_FLOPS)
    assert found.kv_elements == 3 * 20 * 16


def test_weights_that_layers_share_count_once_while_one_of_them_runs() -> None:
    sharing = [replace(layer(i), shared=(("tied", 500),)) for i in (0, 1)]
    model = spec("albert", stack("decoder", *sharing, layer(2)))
    assert model.params == OTHER_PARAMS + 3 * LAYER_PARAMS + 500
    assert _cost("0-2", model).params == model.params
    assert _cost("1-2", model).params == OTHER_PARAMS + 2 * LAYER_PARAMS + 500
    assert _cost("2", model).params == OTHER_PARAMS + LAYER_PARAMS
    assert _cost("2", model).written_params == OTHER_PARAMS + LAYER_PARAMS


@pytest.mark.parametrize("batch", [1, 5])
def test_the_batch_multiplies_work_and_cache_only(batch: int) -> None:
    one, many = _cost("0-3", shape=Shape(1, 7, 9)), _cost("0-3", shape=Shape(batch, 7, 9))
    assert many.prefill_flops == batch * one.prefill_flops
    assert many.decode_flops == batch * one.decode_flops
    assert many.kv_elements == batch * one.kv_elements
    assert (many.params, many.kv_per_token) == (one.params, one.kv_per_token)


def test_new_tensors_are_counted_by_their_shapes() -> None:
    """A low-rank map costs its two matrices, a replaced tensor is added to the shared layer."""
    model, hidden = llama(), llama().stack().hidden
    plan = plan_of("0,~1:m,2-3", model)
    dropped = cost(plan_of("0,2-3", model), model)
    small = {"m.down": (2, hidden), "m.up": (hidden, 2), "m.bias": (hidden,), "other.weight": (9, 9)}
    found = cost(plan, model, weights=small)
    assert found.params - dropped.params == found.written_params - dropped.written_params == 5 * hidden
    assert found.decode_flops - dropped.decode_flops == 2 * 4 * hidden
    assert cost(plan, model).decode_flops - dropped.decode_flops == 2 * hidden**2
    net = cost(plan, model, weights=small | {"m.gate": (2, hidden)})
    assert net.decode_flops - dropped.decode_flops == 2 * 6 * hidden
    scaled = cost(plan, model, weights={"m.scale": (hidden,)})
    assert (scaled.params - dropped.params, scaled.decode_flops) == (hidden, dropped.decode_flops)
    shared = plan_of("0,0:n,2-3", model)
    assert cost(shared, model, weights={"n.mlp.weight": (3, 5)}).params == dropped.params + 15
    assert cost(shared, model).params > dropped.params + 15
    instead = plan_of("0:n,2-3", model)  # nobody reads what the new tensor stands in for
    assert cost(instead, model, weights={"n.mlp.weight": (3, 5)}).params == dropped.params
    half = plan_of("0a,0m:n,2-3", model)
    assert cost(half, model, weights={"n.mlp.weight": (3, 5)}).params == dropped.params
    assert cost(shared, model, weights={"n.mlp.weight": (3, 5)}).written_params == cost(shared, model).written_params


def test_layers_run_and_the_head_have_one_measure() -> None:
    """What pages, policies and budgets call a layer is the same: an attention or an mlp alone is half a one."""
    for text in ("0-7", "0,1a,2m,3", "0,(1|2),3x2", "0,1a,1m,!e?g,2"):
        plan = plan_of(text, llama())
        found = cost(plan, llama())
        assert (
            layers_run(runs(plan.steps()))
            == FIGURES["layers"](found)
            == PlannedStack("decoder", 8, plan.steps()).layer_runs
        )
    assert head_in_layers(llama()) == HEAD_FLOPS / LAYER_FLOPS
