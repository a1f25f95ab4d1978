"""What a base's generation config asks for is no part of the proof: it compares two models, not two ways to write."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import WriteError
from shoal.models.inspect import inspect
from shoal.models.load import Loaded
from shoal.plan import Plan, parse_plan
from shoal.writing.folder import write

from .families import tiny
from .shares import every

ASKED: list[dict[str, Any]] = [
    {"dola_layers": "low"},
    {"assistant_early_exit": 3},
    {"prompt_lookup_num_tokens": 3},
    {"do_sample": True, "temperature": 0.5},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.1},
    {"cache_implementation": "static"},
    {"stop_strings": ["x"]},
    {"bos_token_id": "full_attention"},
    {"eos_token_id": ["x", None]},
    {"pad_token_id": 1.5},
]


@pytest.mark.parametrize("asked", every(3, ASKED), ids=lambda asked: next(iter(asked)))
def test_what_a_base_asks_of_generate_is_left_to_it(asked: dict[str, Any], tmp_path: Path) -> None:
    model = copy.deepcopy(tiny("llama"))
    for name, value in asked.items():
        setattr(model.generation_config, name, value)
    plan = parse_plan("0,2-3", Plan.identity(inspect(model)))
    done = write(Loaded(model, None, "x"), plan, tmp_path / "out")
    assert done.proof is not None and done.proof.passed
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert {name: kept.get(name) for name in asked if name != "assistant_early_exit"} == {
        name: value for name, value in asked.items() if name != "assistant_early_exit"
    }
    assert {name: getattr(model.generation_config, name) for name in asked} == asked


@pytest.mark.parametrize("positions", [1, 2, 3, 30])
def test_a_model_of_few_positions_is_proved(positions: int, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.config.max_position_embeddings = positions
    plan = parse_plan("0,2-3", Plan.identity(inspect(model)))
    done = write(Loaded(model, None, "x"), plan, tmp_path / "out")
    assert done.proof is not None and done.proof.passed


def test_what_transformers_will_not_save_is_said(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.generation_config.temperature = 0.5  # without do_sample
    plan = parse_plan("0,2-3", Plan.identity(inspect(model)))
    with pytest.raises(WriteError, match=r"W216: .*temperature"):
        write(Loaded(model, None, "x"), plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_the_loss_of_routers_that_a_config_asks_for_is_not_computed_beside_a_cache(family: str, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny(family))
    model.config.output_router_logits = True
    plan = parse_plan("0,2-3", Plan.identity(inspect(model)))
    done = write(Loaded(model, None, "x"), plan, tmp_path / "out")
    assert done.proof is not None and done.proof.passed
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["output_router_logits"] is True
    assert model.config.output_router_logits is True
