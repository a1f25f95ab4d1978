"""Config fields that follow the depth: every kind of rule by itself, and a survey that sees when one is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

from shoal.errors import PlanError, WriteError
from shoal.models import depth
from shoal.models.depth import depth_of, permuted_config
from shoal.models.inspect import inspect
from shoal.models.order import refuse_order
from shoal.models.stacks import find_stack
from shoal.plan import Plan, parse_plan
from shoal.writing.surgery import blueprint

from ..survey.picture_models import tiny_picture_config
from ..survey.survey import KINDS, survey_here, types
from ..survey.tiny import tiny, tiny_config
from .shares import every

SMOKE = (
    "llama", "gpt2", "qwen2_moe", "gemma3_text", "gemma4_text", "bart", "rembert", "jamba", "smollm3", "deepseek_v3",
    "mamba2", "zaya", "hy_v4", "xlstm",
)  # fmt: skip
REFUSED = {
    "jamba": {"drop a third": "P106", "repeat": "W206", "swap": "W206"},
    "deepseek_v3": {"swap": "W206"},
    "zaya": {"drop first": "W207"},
    "hy_v4": {"drop first": "P126"},
    "xlstm": {"drop first": "P110", "repeat": "P126", "swap": "P126", "swap alike": "P126"},
}


def small(model_type: str, **fields: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, num_hidden_layers=6, **fields)


def changed(config: PreTrainedConfig, *slots: int) -> dict[str, Any]:
    return {name: new for name, (_, new) in permuted_config(config, slots)[1].items()}


def test_a_list_with_one_entry_a_layer_is_permuted() -> None:
    config = small("smollm3", no_rope_layers=[1, 1, 0, 1, 0, 1])
    assert changed(config, 0, 2, 2, 4)["no_rope_layers"] == [1, 0, 0, 0]


def test_a_list_of_indices_is_renamed() -> None:
    config = small("bamba", attn_layer_indices=[1, 4])
    assert changed(config, 0, 2, 4, 4)["attn_layer_indices"] == [2, 3]


def test_a_period_is_found_or_refused() -> None:
    config = small("jamba", attn_layer_period=3, attn_layer_offset=1, expert_layer_period=7, expert_layer_offset=6)
    assert changed(config, 0, 1, 2, 4) == {"num_hidden_layers": 4, "attn_layer_period": 2}
    with pytest.raises(WriteError, match=r"attn_layer_period and attn_layer_offset .*\(x\.xx\.\)") as caught:
        permuted_config(config, (1, 0, 4, 1, 2))
    assert caught.value.code == "W206"


def test_the_first_k_can_become_fewer_but_not_move_back() -> None:
    config = small("deepseek_v3", first_k_dense_replace=3)
    assert changed(config, 0, 2, 3, 4)["first_k_dense_replace"] == 2
    with pytest.raises(WriteError, match="first_k_dense_replace"):
        permuted_config(config, (3, 0))


@pytest.mark.parametrize(
    ("sources", "slots", "wanted"),
    [
        ([0, 1, 2, 3, 4, 5], (0, 2, 2, 4), [0, 1, 2, 3]),
        ([0, 1, 1, 3, 4, 5], (0, 1, 2, 4), [0, 1, 1, 3]),
        ([0, 1, 1, 3, 4, 5], (0, 1, 3), None),
        ([0, 1, 1, 3, 4, 5], (0, 2, 3, 4), None),
        ([0, 1, 1, 3, 4, 5], (1, 0, 2, 3), None),
    ],
)
def test_layers_whose_kv_others_read_keep_their_place(
    sources: list[int], slots: tuple[int, ...], wanted: list[int] | None
) -> None:
    config = small("mistral_large4_text", kv_source_layers=sources, first_k_dense_replace=0)
    if wanted is None:
        with pytest.raises(WriteError, match="kv_source_layers"):
            permuted_config(config, slots)
    else:
        assert changed(config, *slots)["kv_source_layers"] == wanted


def test_a_config_that_its_class_does_not_accept_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "RULES", ())
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(tiny_picture_config("mistral_large4"))
    with pytest.raises(WriteError, match="kv_source_layers") as caught:
        blueprint(model, parse_plan("0-4", Plan.identity(inspect(model))))
    assert caught.value.code == "W216"


def test_a_list_of_exceptions_can_say_anything() -> None:
    config = small("qwen2_moe", decoder_sparse_step=2, mlp_only_layers=[3])
    found = changed(config, 5, 3, 1)
    assert (found["decoder_sparse_step"], found["mlp_only_layers"]) == (1, [1])


def test_an_interval_with_bounds_is_searched() -> None:
    config = small("ernie4_5_moe", moe_layer_interval=1, moe_layer_start_index=2, moe_layer_end_index=4)
    found = changed(config, 1, 2, 4)
    assert found["moe_layer_start_index"] == 1
    with pytest.raises(WriteError, match="moe_layer_interval"):
        permuted_config(config, (2, 3, 0, 0, 2, 0, 0, 0, 2))


def test_attention_types_become_one_run_a_layer() -> None:
    config = tiny_config("gpt_neo")
    assert changed(config, 1, 1, 0)["attention_types"] == [[["local"], 1], [["local"], 1], [["global"], 1]]


def test_a_repeating_pattern_is_spelt_out() -> None:
    config = small("recurrent_gemma", block_types=["recurrent", "recurrent", "attention"])
    assert changed(config, 0, 2, 5)["block_types"] == ["recurrent", "attention", "attention"]


def test_per_layer_config_moves_with_its_layers() -> None:
    made, _ = permuted_config(tiny_config("gemma4_text"), (0, 1, 3, 4, 5))
    assert made.to_dict()["per_layer_config"] == {str(i): {"head_dim": 16} for i in (1, 2, 4)}


def test_the_scale_of_minicpm_follows_the_depth_to_the_last_bit() -> None:
    config = tiny_config("minicpm3")
    for slots in ((0,), (0, 1, 2), (0, 1, 2, 3, 5), (0, 1, 2, 3, 4, 5, 5)):
        made, _ = permuted_config(config, slots)
        assert made.scale_depth / len(slots) ** 0.5 == config.scale_depth / 6**0.5


def test_a_config_with_an_encoder_is_read_by_its_decoder() -> None:
    config = AutoConfig.for_model("bart", encoder_layers=12, decoder_layers=6)
    assert depth_of(config) == 6
    assert changed(config, 0, 5) == {"decoder_layers": 2, "encoder_layers": 2}


@pytest.mark.parametrize(("model_type", "layers"), [("rwkv", (0, 1, 1)), ("zamba2", (0, 2, 1))])
def test_an_order_that_a_family_cannot_run_is_refused(model_type: str, layers: tuple[int, ...]) -> None:
    stack = find_stack(tiny(model_type))
    refuse_order(stack, (0, 1, 3))
    with pytest.raises(PlanError, match=f"in {model_type} ") as caught:
        refuse_order(stack, layers)
    assert caught.value.code == "P126"


def test_a_layer_that_takes_over_from_the_one_before_cannot_be_the_first() -> None:
    stack = find_stack(tiny("hy_v4"))
    refuse_order(stack, (3, 1, 0))
    with pytest.raises(PlanError, match="layer 4 runs first, but its indexer_types entry is 'shared'") as caught:
        refuse_order(stack, (4, 0))
    assert caught.value.code == "P126"


def test_every_name_of_the_depth_is_written() -> None:
    assert changed(tiny_config("xlstm"), 0, 5) == {"num_hidden_layers": 2, "num_blocks": 2}


@pytest.mark.parametrize("model_type", every(3, SMOKE))
def test_the_survey_finds_nothing_wrong(model_type: str, tmp_path: Path) -> None:
    row = survey_here(model_type, tmp_path)
    assert row.missing is None
    assert row.verdicts == dict.fromkeys(KINDS, "right") | REFUSED.get(model_type, {})
    assert set(row.reasons) == set(REFUSED.get(model_type, {}).values())


def test_the_survey_knows_every_causal_type() -> None:
    assert set(SMOKE) < set(types())
    assert len(types()) >= 150


def test_a_wrong_list_turns_the_row_red(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SmolLM3 leaves RoPE out of every fourth layer, and nothing but this list says of which."""
    monkeypatch.setattr(depth, "PER_LAYER", tuple(name for name in depth.PER_LAYER if name != "no_rope_layers"))
    monkeypatch.setattr("shoal.writing.surgery.require_same_layers", lambda *_: None)
    assert survey_here("smollm3", tmp_path).wrong


def test_without_a_rule_the_comparison_of_layers_still_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(depth, "RULES", ())
    row = survey_here("deepseek_v3", tmp_path)
    assert not row.wrong
    assert row.verdicts["drop first"] == "W207"


def test_blocks_of_a_packed_tensor_left_in_place_turn_the_row_red(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shoal.writing.surgery.resized_tensors", lambda *_: {})
    row = survey_here("gemma4_text", tmp_path)
    assert row.verdicts["swap alike"].startswith("wrong: ")
