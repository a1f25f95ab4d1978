"""LoRA adapters: at work in a model while it is measured, and renumbered beside a model of another depth."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from shoal.api.measuring import measure
from shoal.cli import app
from shoal.errors import ShoalError
from shoal.live import running
from shoal.models.adapter import attach, is_adapted
from shoal.models.load import load
from shoal.plan import Plan, parse_plan
from shoal.writing.adapter import PLACE, renumbered
from shoal.writing.folder import write
from shoal.writing.surgery import blueprint

from .test_api import folder  # noqa: F401

IDS = torch.arange(3, 23)[None]
SETTINGS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "down_proj"]},
    "layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 3, 4]},
    "layers by pattern": {"target_modules": ["up_proj"], "layers_to_transform": [3, 4], "layers_pattern": "layers"},
    "a regular expression": {"target_modules": r".*layers\.(1|3)\.(self_attn\.(q|k)_proj|mlp\.up_proj)"},
    "names of layers": {"target_modules": ["layers.1.self_attn.q_proj", "model.layers.4.mlp.gate_proj", "lm_head"]},
    "left out by layer": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.[03]\..*"},
    "ranks by layer": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {r"layers\.3\.self_attn\.q_proj": 6, "v_proj": 3},
        "alpha_pattern": {"model.layers.4.self_attn.v_proj": 32, r".*\.1\..*q_proj": 2},
    },
    "dora and biases": {"target_modules": ["q_proj", "o_proj"], "use_dora": True, "use_rslora": True},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "all linear": {"target_modules": "all-linear"},
}
PLANS = ("0,1,3-4", "4,0,3x2", "1,3a,4")


def adapter(base: Path, place: Path, **settings: Any) -> Path:
    """An adapter of random weights that changes what the base computes."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    made = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    for name, tensor in made.named_parameters():
        if "modules_to_save" in name:
            tensor.data += 0.1 * torch.randn_like(tensor)
    made.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def lora(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return adapter(folder, tmp_path_factory.mktemp("lora") / "a", target_modules=["q_proj", "down_proj"])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(("name", "plan"), list(zip(SETTINGS, cycle(PLANS), strict=False)))
def test_renumbered_it_does_what_it_does_live(folder: Path, tmp_path: Path, name: str, plan: str) -> None:  # noqa: F811
    old = adapter(folder, tmp_path / "old", **SETTINGS[name])
    base = load(folder, device="cpu")
    wanted = parse_plan(plan, Plan.identity(base.opened.spec))
    plans = blueprint(base.model, wanted, zero_parts=True)
    made = renumbered(old, base.model, plans, "there")
    write(base, wanted, tmp_path / "out", zero_parts=True, prove=False, adapter=old)
    assert json.loads((tmp_path / "out" / PLACE / "adapter_config.json").read_text())["r"] == 4
    assert load_file(tmp_path / "out" / PLACE / "adapter_model.safetensors").keys() == made.tensors.keys()
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"), str(tmp_path / "out" / PLACE)
    )
    live = load(folder, device="cpu", adapter=old)
    with running(live.model, wanted):
        expected = logits(live.model)
    assert torch.allclose(logits(again.eval()), expected, atol=1e-5, rtol=0)
    with running(base.model, wanted):
        assert not torch.allclose(logits(base.model), expected, atol=1e-3)  # the adapter counts


def test_written_and_proved_by_the_command_line(folder: Path, lora: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    words = ["write", str(folder), "--plan", "0,1,3-4", "--adapter", str(lora), "--output", str(out), "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    checks = {check["name"]: check["passed"] for check in json.loads(result.stdout)["proof"]["checks"]}
    assert {"logits uncached", "adapter logits uncached", "adapter logits cached", "adapter greedy tokens"} <= set(
        checks
    )
    assert all(checks.values())
    config = json.loads((out / PLACE / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out)
    assert isinstance(AutoModelForCausalLM.from_pretrained(out / PLACE).get_input_embeddings(), torch.nn.Embedding)


def test_the_base_is_given_back_as_it_was(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    old = adapter(folder, tmp_path / "old", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = load(folder, device="cpu").model
    modules, before = dict(model.named_modules()), logits(model)
    put = attach(model, old, "base")
    assert is_adapted(model)
    assert not torch.equal(logits(model), before)
    put.detach()
    assert not is_adapted(model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_verbs_run_with_the_adapter_in(folder: Path, lora: Path, tmp_path: Path) -> None:  # noqa: F811
    small = {"length": 32, "limit": 2}
    with_it = measure(folder, adapter=lora, **small)
    assert with_it.values != measure(folder, **small).values
    merged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(lora)).merge_and_unload()
    tokenizer = load(folder).tokenizer
    assert with_it.values == pytest.approx(measure(merged.eval(), tokenizer=tokenizer, **small).values, abs=1e-5)
    few = ["--limit", "1", "--adapter", str(lora)]
    for words in (
        ["measure", str(folder), "--length", "32", *few],
        ["evaluate", str(folder), "--window", "32", "--new-tokens", "2", "--plan", "0-3", *few],
        ["prune", str(folder), "--drop", "1", "--length", "32", "--no-assess", *few],
        ["generate", str(folder), "hi", "--max-new-tokens", "2", "--adapter", str(lora)],
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output


def changed(lora: Path, place: Path, **fields: Any) -> Path:
    place.mkdir()
    config = json.loads((lora / "adapter_config.json").read_text()) | fields
    (place / "adapter_config.json").write_text(json.dumps(config))
    (place / "adapter_model.safetensors").write_bytes((lora / "adapter_model.safetensors").read_bytes())
    return place


def renamed(lora: Path, place: Path, change: Callable[[str], str]) -> Path:
    tensors = {change(name): tensor for name, tensor in load_file(lora / "adapter_model.safetensors").items()}
    changed(lora, place)
    save_file(tensors, place / "adapter_model.safetensors")
    return place


def test_what_cannot_be_told_is_refused_by_name(folder: Path, lora: Path, tmp_path: Path) -> None:  # noqa: F811
    cases: dict[str, tuple[Path, str]] = {
        "W295": (changed(lora, tmp_path / "1", layer_replication=[[0, 3], [1, 5]]), "layer_replication"),
        "W297": (renamed(lora, tmp_path / "2", lambda name: name.replace("layers", "blocks")), "blocks"),
        "M380": (folder, "no adapter_config.json"),
        "W299": (adapter(folder, tmp_path / "3", target_modules=["q_proj"], layers_to_transform=[2]), "layer"),
        "M381": (changed(lora, tmp_path / "4"), "adapter_model.safetensors"),
    }
    (tmp_path / "4" / "adapter_model.safetensors").rename(tmp_path / "4" / "adapter_model.bin")
    for code, (place, said) in cases.items():
        words = ["write", str(folder), "--plan", "0-1,3-4", "--adapter", str(place), "--output", str(tmp_path / "out")]
        result = CliRunner().invoke(app, words)
        assert (result.exit_code, f"{code}: " in result.stderr, said in result.stderr) == (1, True, True), result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
    for code, place in {
        "M384": renamed(lora, tmp_path / "5", lambda name: name.replace("layers.1.", "layers.7.")),
        "M383": changed(lora, tmp_path / "6", alora_invocation_tokens=[1, 2]),
        "M380": folder,
    }.items():
        with pytest.raises(ShoalError) as caught:
            load(folder, device="cpu", adapter=place)
        assert caught.value.code == code, caught.value


def test_options_that_do_not_go_together(folder: Path, lora: Path, tmp_path: Path) -> None:  # noqa: F811
    out = str(tmp_path / "out")
    plan = ["--plan", "0-1", "--adapter", str(lora)]
    for code, words in (
        ("U672", ["write", str(folder), *plan, "--stream", "--output", out]),
        ("U672", ["write", str(folder), *plan, "--output", f"{out}.gguf"]),
        ("U672", ["measure", str(folder), "--stream", "--adapter", str(lora)]),
        ("U671", ["prune", str(folder), "--drop", "1", "--adapter", str(lora), "--output", out]),
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 1
        assert f"shoal: {code}: " in result.stderr
    live = load(folder, device="cpu", adapter=lora)
    with pytest.raises(ShoalError, match="W211"):
        write(live, Plan.identity(live.opened.spec), tmp_path / "out")
    own = load(folder, device="cpu")
    own.model.load_adapter(str(lora))  # transformers' own way
    with pytest.raises(ShoalError, match="W211"):
        write(own, Plan.identity(own.opened.spec), tmp_path / "out")
