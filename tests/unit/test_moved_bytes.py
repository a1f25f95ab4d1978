"""The bytes that a decode step reads, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from shoal.errors import UsageError
from shoal.plan import Shape, Spec
from shoal.plan.moved import Moved, moved
from unit.specs import ATTENTION, HEAD_FLOPS, HIDDEN, LAYER_FLOPS, MLP, alternating, hybrid, llama, two_stacks

AT = Shape(batch=1, prompt=10, context=20)
HEAD, MATRICES, KV = HEAD_FLOPS // 2, LAYER_FLOPS // 2, 16 * 20
A, M = ATTENTION.flops // 2, MLP.flops // 2


def _moved(text: str, model: Spec | None = None, shape: Shape = AT, dtype: str = "bfloat16", **more: object) -> Moved:
    return moved(text, model or llama(), shape, dtype=dtype, **more)  # type: ignore[arg-type]


def test_the_whole_model_reads_all_matrices_and_all_keys_and_values() -> None:
    found = _moved("0-7")
    assert (found.weights, found.kv, found.near) == (2 * (8 * MATRICES + HEAD), 2 * 8 * KV, 0)
    assert found.total == found.weights + found.kv == found.to_dict()["total"]
    assert found.parts == 16


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float8_e4m3fn", 1)])
def test_bytes_follow_the_dtype(dtype: str, size: int) -> None:
    assert _moved("0-7", dtype=dtype).total == size * _moved("0-7", dtype="float8_e5m2").total


def test_keys_and_values_may_have_a_dtype_of_their_own() -> None:
    found = _moved("0-7", dtype="float32", kv_dtype="float16")
    assert (found.weights, found.kv) == (4 * (8 * MATRICES + HEAD), 2 * 8 * KV)


def test_a_loop_reads_its_weights_again() -> None:
    assert _moved("0x8").weights == _moved("0-7").weights
    assert _moved("0x8").kv == _moved("0-7").kv, "each execution has a slot"


def test_dropped_parts_are_not_read() -> None:
    assert _moved("0-6,7a").weights == 2 * (7 * MATRICES + A + HEAD)
    assert _moved("0-6,7m").kv == 2 * 7 * KV


def test_who_reads_the_keys_of_another_reads_as_many() -> None:
    assert _moved("0,1@0,2-7").kv == _moved("0-7").kv
    assert _moved("0,1@a0,2-7").kv == 2 * (7 * KV + KV // 2), "of the map's reader the values alone"


def test_windows_and_recurrent_states() -> None:
    assert _moved("0-7", alternating()).kv == 2 * (4 * 16 * 4 + 4 * KV)
    assert _moved("0-7", hybrid()).kv == 2 * (2 * KV + 5 * 96)
    assert _moved("0-7", hybrid()).parts == 15


def test_an_encoder_does_not_run_for_a_token() -> None:
    assert _moved("encoder: 0-3; decoder: 0-5", two_stacks()).weights == 2 * (6 * MATRICES + HEAD)


def test_a_batch_reads_weights_once_and_keys_for_each() -> None:
    found = _moved("0-7", shape=Shape(batch=3, prompt=10, context=20))
    assert found.kv == 3 * _moved("0-7").kv
    assert found.weights == _moved("0-7").weights


def test_a_map_reads_its_matrix() -> None:
    assert _moved("0-1,~2,3-7").weights == 2 * (7 * MATRICES + HIDDEN**2 + HEAD)
    low = {"map-2-2.down": (2, HIDDEN), "map-2-2.up": (HIDDEN, 2)}
    assert _moved("0-1,~2,3-7", weights=low).weights == 2 * (7 * MATRICES + 4 * HIDDEN + HEAD)


def test_new_tensors_stand_in_the_place_of_as_many() -> None:
    assert _moved("0-6,7:a").weights == _moved("0-7").weights, "nothing is known of them"
    one = {"a.mlp.down_proj.weight": (HIDDEN, 32)}
    assert _moved("0-6,7:a", weights=one).weights == _moved("0-7").weights


def test_what_fits_into_the_cache_is_read_once() -> None:
    """Two executions of one layer, with a slot of keys each: 3 things of 2 M, 2 A and 2 KV bytes lie between."""
    layer, kv = 2 * MATRICES, 2 * KV
    assert _moved("0x2,1-7", cache_bytes=layer + kv).near == layer
    assert _moved("0x2,1-7", cache_bytes=layer + kv - 1).near == 0
    everything = _moved("0-7").total
    assert _moved("0-7", cache_bytes=everything).total == 0
    assert _moved("0-7", cache_bytes=everything - 1).near == 0, "each is read after all the others"


def test_one_mlp_for_all_stays_if_an_attention_fits_beside_it() -> None:
    text = ",".join(f"{i}a,0m" for i in range(8))
    between = 2 * (A + KV + M)
    assert _moved(text).weights == _moved("0-7").weights
    assert _moved(text, cache_bytes=between).near == 7 * 2 * M
    assert _moved(text, cache_bytes=between - 1).near == 0


def test_a_dtype_without_a_size_is_refused() -> None:
    with pytest.raises(UsageError, match="int3 is not one of float64, float32") as caught:
        _moved("0-7", dtype="int3")
    assert caught.value.code == "U502"
