"""A rewritten model shares tensors with its base without changing one, and is saved under the names of its base."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from shoal.models.inspect import inspect
from shoal.plan import Plan, parse_plan
from shoal.writing.manifest import manifest_of
from shoal.writing.surgery import rewrite

from ..survey.tiny import tiny as any_tiny
from .families import FAMILIES, tiny

CONVERTED = ("gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "nemotron_h")
"""Families whose tensors have other names in files than in memory."""
PLAN = "1-3,3"
SLOTS = (1, 2, 3, 3)


def bits(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def require_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def names(folder: Path) -> set[str]:
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= set(tensors.keys())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_the_same_to_the_last_bit(family: str) -> None:
    base = tiny(family, "eager")
    before = bits(base)
    made = rewrite(base, Plan.identity(inspect(base)))
    require_same(bits(base), before)
    require_same(bits(made), before)
    assert made.state_dict().keys() == before.keys()
    theirs, mine = base.state_dict(), made.state_dict()
    copied = [name for name in theirs if mine[name].data_ptr() != theirs[name].data_ptr() and theirs[name].numel()]
    assert all("per_layer" in name for name in copied), (
        "only tensors with a block for every layer are put together anew"
    )


def test_a_padding_row_that_youtu_zeroes_stays_in_the_base() -> None:
    base = any_tiny("youtu")
    with torch.no_grad():
        base.get_input_embeddings().weight[0] = 1.0
    before = bits(base)
    made = rewrite(base, parse_plan("0-2,4-5", Plan.identity(inspect(base))))
    require_same(bits(base), before)
    assert torch.equal(made.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_a_class_that_writes_to_everything_it_loads_reaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny("llama")
    before = bits(base)

    def spoil(_: PreTrainedModel, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data[:] = 7.0

    monkeypatch.setattr(LlamaPreTrainedModel, "_init_weights", spoil)
    made = rewrite(base, Plan.identity(inspect(base)))
    require_same(bits(base), before)
    require_same(bits(made), before)


def test_weights_that_the_config_ties_and_the_base_does_not_stay_apart(tmp_path: Path) -> None:
    base = any_tiny("qwen2")
    base.config.tie_word_embeddings = True
    assert base.lm_head.weight is not base.model.embed_tokens.weight
    made = rewrite(base, Plan.identity(inspect(base)))
    assert torch.equal(made.lm_head.weight, base.lm_head.weight)
    assert torch.equal(made.model.embed_tokens.weight, base.model.embed_tokens.weight)
    made.save_pretrained(tmp_path)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= names(tmp_path)


@pytest.mark.parametrize("family", CONVERTED)
def test_tensors_have_the_names_that_they_had_in_the_files(family: str, tmp_path: Path) -> None:
    """The same names as `--stream`, as a stock save of the written model, and as the source's with other numbers."""
    fresh, source = tiny(family, "eager"), tmp_path / "source"
    fresh.save_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    assert names(source) != set(base.state_dict()), "the family shows nothing"
    plan = parse_plan(PLAN, Plan.identity(inspect(base)))
    for which, model in (("loaded", base), ("fresh", fresh)):
        rewrite(model, plan).save_pretrained(tmp_path / which)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "loaded", attn_implementation="eager")
    again.save_pretrained(tmp_path / "again")
    expected = {item.name for item in manifest_of(source, plan).items}
    assert expected == {
        re.sub(r"(layers\.)\d+\.", rf"\g<1>{slot}.", name)
        for slot, layer in enumerate(SLOTS)
        for name in names(source)
        if not re.search(r"layers\.\d+\.", name) or f"layers.{layer}." in name
    }
    for which in ("loaded", "fresh", "again"):
        assert names(tmp_path / which) == expected


def test_a_base_saved_under_the_names_of_memory_keeps_them(tmp_path: Path) -> None:
    fresh = tiny("mixtral")
    fresh.save_pretrained(tmp_path / "source", save_original_format=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    rewrite(base, Plan.identity(inspect(base))).save_pretrained(tmp_path / "made")
    assert names(tmp_path / "made") == names(tmp_path / "source") == set(fresh.state_dict())
