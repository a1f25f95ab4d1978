"""What `from_pretrained` is asked of a planned checkpoint besides its folder counts, or is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import shoal.auto  # noqa: F401 - tells transformers of planned checkpoints
from shoal.errors import ModelError
from shoal.live import running
from shoal.models.load import Loaded
from shoal.planned import ShoalForCausalLM
from shoal.writing.planned_folder import write_planned

from .families import tiny
from .test_planned import IDS, logits


def written(family: str, out: Path, plan: str = "0-1,3") -> Path:
    write_planned(Loaded(tiny(family), None, "tiny"), plan, out, prove=False)
    return out


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_that_was_asked_for(attention: str, tmp_path: Path) -> None:
    """By the Auto class, which keeps it in the config, and by the class itself."""
    folder = written("llama", tmp_path / "one")
    with running(tiny("llama", attention), "0-1,3"):
        want = logits(tiny("llama", attention))
    for kind in (AutoModelForCausalLM, ShoalForCausalLM):
        made = kind.from_pretrained(folder, attn_implementation=attention)
        assert made.config._attn_implementation == attention
        assert torch.equal(logits(made), want)


def test_experts_are_computed_as_in_the_base(tmp_path: Path) -> None:
    """Not as a model without weights computes them; and as the caller says."""
    folder, model = written("mixtral", tmp_path / "one"), tiny("mixtral")
    with running(model, "0-1,3"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    for way in ("eager", "batched_mm", "grouped_mm"):
        made = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=way)
        assert made.config._experts_implementation == way


def test_fields_of_the_base_are_options(tmp_path: Path) -> None:
    folder = written("llama", tmp_path / "one")
    made = AutoModelForCausalLM.from_pretrained(folder, use_cache=False, output_hidden_states=True, pad_token_id=7)
    assert (made.config.use_cache, made.config.pad_token_id) == (False, 7)
    with torch.no_grad():
        out = made(input_ids=IDS)
    assert out.past_key_values is None and len(out.hidden_states) == 4
    assert AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("option", "code"),
    [
        ({"ignore_mismatched_sizes": True}, "M401"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "M401"),
        ({"tp_plan": "auto"}, "M401"),
        ({"subfolder": "x"}, "M401"),
        ({"vocab_size": 70}, "M310"),
        ({"num_hidden_layers": 3}, "P101"),
    ],
    ids=str,
)
def test_what_would_change_nothing_is_refused(option: dict[str, Any], code: str, tmp_path: Path) -> None:
    folder = written("llama", tmp_path / "one")
    with pytest.raises(Exception, match=code):
        ShoalForCausalLM.from_pretrained(folder, **option)
    for nothing in ({"quantization_config": None}, {"subfolder": ""}, {"low_cpu_mem_usage": True}):
        ShoalForCausalLM.from_pretrained(folder, **nothing)


WITHOUT = """
import json, sys
sys.modules["shoal"] = None
import transformers
said = []
for folder in sys.argv[1:]:
    said.append({})
    for name in ("AutoConfig", "AutoModelForCausalLM", "LlamaForCausalLM", "LlamaModel"):
        try:
            getattr(transformers, name).from_pretrained(folder)
            said[-1][name] = "made"
        except Exception as error:
            said[-1][name] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


def test_plain_transformers_refuses_the_folder(tmp_path: Path) -> None:
    """Where Shoal cannot be imported, with a sentence of its own, and by the base's own class too: that finds its
    config inside ours, and of a plan that reads all tensors in another order it would make the base, which writes other
    tokens. The same process reads a stock folder, and makes that base where the files have the names of stock ones."""
    planned = written("llama", tmp_path / "planned", "0,2,1,3")
    shards = tmp_path / "shards"
    write_planned(Loaded(tiny("llama"), None, "tiny"), "0-1,3", shards, prove=False, shard_size="10KB")
    tiny("llama").save_pretrained(tmp_path / "stock")
    renamed = written("llama", tmp_path / "renamed", "0,2,1,3")
    (renamed / "planned.safetensors").rename(renamed / "model.safetensors")
    words = [sys.executable, "-c", WITHOUT, *map(str, (planned, shards, tmp_path / "stock", renamed))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    *refused, stock, other = json.loads(done.stdout.splitlines()[-1])
    for said in refused:
        for name in ("AutoConfig", "AutoModelForCausalLM"):
            assert "model type `shoal`" in said[name], said[name]
        for name in ("LlamaForCausalLM", "LlamaModel"):
            assert said[name].startswith("OSError") and "no file named model.safetensors" in said[name], said[name]
    assert set(stock.values()) == {"made"}
    assert other["LlamaForCausalLM"] == "made"


def test_a_folder_of_an_earlier_shoal_is_loaded(tmp_path: Path) -> None:
    """Its files had the names of stock ones."""
    planned = written("llama", tmp_path / "one", "0,2,1,3")
    want = logits(AutoModelForCausalLM.from_pretrained(planned))
    (planned / "planned.safetensors").rename(planned / "model.safetensors")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(planned)), want)
    with pytest.raises(ModelError, match="M384"):
        AutoModelForCausalLM.from_pretrained(planned, device_map="balanced")
