"""What a planned checkpoint says to engines: a slot for every run, and a stock config with a layer for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import shoal.auto  # noqa: F401 - tells transformers of planned checkpoints
from shoal.models.engine_slots import engine_slots
from shoal.models.opened import open_model
from shoal.models.stacks import find_stack
from shoal.plan import Plan, parse_plan
from shoal.writing.planned_folder import write_planned

from .families import tiny
from .shares import every

FAMILIES = ["llama", "gpt2", "opt", "qwen2", "gemma3_text", "mixtral", "cohere2", "smollm3", "gpt_oss", "olmo2"]


def slots_of(family: str, text: str) -> dict[str, Any]:
    opened = open_model(tiny(family, "eager"))
    found = engine_slots(opened, parse_plan(text, Plan.identity(opened.spec)), {})
    assert found is not None
    return found


def test_each_run_is_a_slot_that_names_its_sources() -> None:
    found = slots_of("llama", "0-1,1,2@1,3@v0@a1,~0-1:m,2a=0:x,0m=s:x,~2-3:n")
    assert found["slots"] == [
        {"base": 0, "part": "layer"},
        {"base": 1, "part": "layer"},
        {"base": 1, "part": "layer"},
        {"base": 2, "part": "layer", "keys": 2, "values": 2},
        {"base": 3, "part": "layer", "values": 0, "map": 2},
        {"base": 2, "part": "attention", "tie": 0, "own": ["x"], "before": ["m"]},
        {"base": 0, "part": "mlp", "own": ["s", "x"]},
    ]
    assert found["behind"] == ["n"] and found["architectures"] == ["LlamaForCausalLM"]
    assert found["config"]["num_hidden_layers"] == 7
    assert found["parts"]["3"] == {
        "attention": ["self_attn"],
        "mlp": ["mlp"],
        "returns": {"self_attn": 1, "mlp": -1},
        "stored": {"self_attn.k_proj": 16, "self_attn.v_proj": 16},
    }


@pytest.mark.parametrize("family", every(3, FAMILIES))
def test_the_stock_config_has_a_layer_of_the_right_kind_for_each_slot(family: str) -> None:
    found = slots_of(family, "0,2,1,3,0")
    fields = dict(found["config"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    assert type(model).__name__ == found["architectures"][0]
    base = find_stack(tiny(family, "eager"))
    for slot, layer in zip(found["slots"], find_stack(model).layers, strict=True):
        own = {name: p.shape for name, p in layer.named_parameters()}
        assert own == {name: p.shape for name, p in base.layer(slot["base"]).named_parameters()}


def test_what_is_no_run_has_no_slots() -> None:
    opened = open_model(tiny("llama", "eager"))
    for text in ("0,(1|2),3", "0-1,!e?g,2-3", "0,1@3,2-3"):
        assert engine_slots(opened, parse_plan(text, Plan.identity(opened.spec)), {}) is None
    gemma = open_model(tiny("gemma3n_text", "eager"))
    identity = Plan.identity(gemma.spec)
    assert engine_slots(gemma, identity.with_steps((*identity.steps(), identity.steps()[0])), {}) is None


def test_the_folder_has_them_beside_the_plan(tmp_path: Path) -> None:
    model = tiny("llama", "eager")
    write_planned(model, "0-1,2=0,3@1", tmp_path / "m", prove=False)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert [slot["base"] for slot in config["slots"]["slots"]] == [0, 1, 2, 3]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["slots"] == config["slots"]
    write_planned(model, "0,(1|2),3", tmp_path / "group", prove=False)
    group = json.loads((tmp_path / "group" / "config.json").read_text())
    assert group.get("slots") is None and group["no_slots"] == "layers run in parallel"
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert loaded(input_ids=ids).logits.isfinite().all()
