"""Planned checkpoints: what a folder holds, that it computes what the live plan computes, and who refuses it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import shoal.auto
from shoal.api.bench_policy import bench_policy
from shoal.api.calibrate import calibrate
from shoal.api.compare import compare
from shoal.api.fit_exits import fit_exits
from shoal.api.heal import heal
from shoal.api.measuring import measure
from shoal.api.prune import prune
from shoal.api.redundancy import redundancy
from shoal.errors import ModelError, PlanError, ShoalError, WriteError
from shoal.live import running
from shoal.models.load import Loaded, load
from shoal.models.stacks import find_stack
from shoal.plan import Plan, cost, parse_plan, shapes_of
from shoal.planned import PlannedCheckpoint, handle_of
from shoal.writing.planned_folder import write_planned

from .families import VOCAB, tiny
from .shares import every
from .test_cli import shoal as command

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
PLANS = [
    "0,1-3=0",
    "0-1,2-3=0-1",
    "0,1x2,3",
    "0,1@0,2-3",
    "0,1a,1m=0,2m,3",
    "0,2,1,3",
    "0,(1|2),3",
    "0,1:x,~2-3",
    "0-2,3@v1",
    "0-2,3@k1",
    "0-2,3@a1",
]
FAMILIES = [
    "llama",
    "gpt2",
    "opt",
    "qwen2",
    "gemma3_text",
    "mixtral",
    "olmo2",
    "phi3",
    "stablelm",
    "gpt_neo",
    "cohere2",
]
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """New tensors for layer 1 and for a map, in float32 whatever the model has."""
    generator = torch.Generator().manual_seed(7)
    layer = find_stack(model).layer(1)
    name, old = next((n, p) for n, p in layer.named_parameters() if p.dim() == 2)
    size = model.config.hidden_size
    return {
        f"x.{name}": torch.randn(old.shape, generator=generator) * 0.1,
        "map-2-3.weight": torch.eye(size) + 0.1 * torch.randn(size, size, generator=generator),
    }


def own(family: str) -> Any:
    return copy.deepcopy(tiny(family, "eager" if family == "gpt_neo" else "sdpa"))


def params(model: Any) -> int:
    return sum({(p.data_ptr(), p.numel()): p.numel() for p in model.parameters()}.values())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def written(family: str, text: str, out: Path, **more: Any) -> tuple[Any, Plan, dict[str, torch.Tensor]]:
    """The model, the plan, the tensors that it names, and what it computes, with its folder written but not proved."""
    model = own(family)
    loaded = Loaded(model, None, "tiny")
    plan = parse_plan(text, Plan.identity(loaded.opened.spec))
    weights = weights_of(model) if ":" in text or "~" in text else {}
    write_planned(loaded, plan, out, weights=weights, prove=False, **more)
    return model, plan, weights


REFUSED = {
    **{(family, "0,1@0,2-3"): "P108" for family in ("qwen2", "gemma3_text")},
    **{(family, f"0-2,3@{half}1"): "P108" for family in ("gemma3_text", "cohere2") for half in "kva"},
    ("gpt_neo", "0-2,3@a1"): "P141",
}
"""Plans that the family cannot run live either."""
CASES = [(family, plan) for family in FAMILIES for plan in PLANS]


@pytest.mark.parametrize("case", every(6, CASES), ids=str)
def test_the_loaded_checkpoint_is_the_live_plan(case: tuple[str, str], tmp_path: Path) -> None:
    """Bit for bit, cached too; the file holds what the plan reads and as much as its cost says, and is saved again."""
    family, text = case
    if case in REFUSED:
        with pytest.raises(PlanError, match=REFUSED[case]):
            written(family, text, tmp_path / "one")
        return
    model, plan, weights = written(family, text, tmp_path / "one")
    with running(model, plan, weights):
        want, tokens = logits(model), model.generate(IDS, **GREEDY)
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(made.generate(IDS, **GREEDY), tokens)
    assert torch.equal(logits(made), want)
    assert isinstance(made, PlannedCheckpoint)
    assert isinstance(made, type(model))
    stored = load_file(tmp_path / "one" / "planned.safetensors")
    buffers = {name for name, _ in model.named_buffers()}
    held = sum(t.numel() for name, t in stored.items() if name not in buffers)
    assert (
        held == params(made) == cost(plan, Loaded(model, None, "tiny").opened.spec, weights=shapes_of(weights)).params
    )
    assert {name for name in stored if name.startswith("shoal.")} == {f"shoal.{name}" for name in weights}
    made.save_pretrained(tmp_path / "two")
    again = load_file(tmp_path / "two" / "planned.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "two")), want)


def test_ties_share_storage_after_loading(tmp_path: Path) -> None:
    """The tied layer has no matrix of its own in memory; a step on the one matrix is seen by both runs."""
    model, plan, _ = written("llama", "0-1,2=1,3", tmp_path / "one")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    tied = {n: p.numel() for n, p in find_stack(made).layer(2).named_parameters()}
    assert {n for n, count in tied.items() if count} == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    for changed in (model, made):
        find_stack(changed).layer(1).mlp.down_proj.weight.data.mul_(0.5)
    with running(model, plan):
        assert torch.equal(logits(made), logits(model))
    made.train()
    made(input_ids=IDS, labels=IDS).loss.backward()
    assert find_stack(made).layer(1).mlp.down_proj.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_that_of_all_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    model, plan, weights = written("llama", "0,1:x,~2-3", tmp_path / "one")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=dtype)
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    with running(model, plan, weights):
        assert torch.equal(logits(made), logits(model))
    assert {p.dtype for p in made.parameters()} == {dtype}


@pytest.mark.parametrize("gone", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "shoal.map-2-3.weight"])
def test_a_missing_tensor_is_an_error(gone: str, tmp_path: Path) -> None:
    written("llama", "0-1,~2-3", tmp_path / "one")
    file = tmp_path / "one" / "planned.safetensors"
    whole = load_file(file)
    tensors = {name: tensor for name, tensor in whole.items() if name != gone}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ShoalError) as caught:
        load(tmp_path / "one")
    assert caught.value.code in ("M310", "P112")
    for wrong in ({gone: torch.zeros(2)}, {"more": torch.zeros(1)}):  # another shape; one too many
        save_file(whole | wrong, file, {"format": "pt"})
        with pytest.raises(ShoalError) as unfit:
            load(tmp_path / "one")
        assert unfit.value.code in ("M310", "P113")


def test_shards_and_the_command_line(tmp_path: Path) -> None:
    """`--as planned` proves the folder in a fresh process; verbs run it without a plan, others refuse it by name."""
    own("llama").save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    words = [str(tmp_path / "base"), "--plan", "0-1,2-3=0-1", "--as", "planned", "--output", str(out)]
    said = json.loads(command("write", *words, "--shard-size", "10KB", "--json", "-q"))
    assert said["proof"]["passed"]
    names = {check["name"] for check in said["proof"]["checks"]}
    assert {"weights", "logits uncached", "logits cached", "greedy tokens", "parameters", "KV rows"} <= names
    assert len(list(out.glob("*.safetensors"))) > 2
    config = AutoConfig.from_pretrained(out)
    assert (config.model_type, config.plan["stacks"]) == ("shoal", {"decoder": ["0-1", "2-3=0-1"]})
    loaded = load(out)
    handle = handle_of(loaded.model)
    assert handle is not None and str(handle.bound.plan) == "0-1,2-3=0-1"
    assert "import shoal.auto" in (out / "README.md").read_text()
    assert shoal.auto.ShoalConfig.model_type == "shoal"
    for words_of in (["inspect"], ["show", "0-2", "--model"], ["doctor"]):
        text = command(*words_of, str(out), code=1)
        assert "M382" in text and "planned checkpoint" in text
    for words_of in (["show"], ["evaluate", "smollm2", "--plan"]):  # it is no place of a plan either
        text = command(*words_of, str(out), code=1)
        assert "N001" in text and "planned checkpoint" in text
    for option in (["--zero-parts"], ["--stream"]):
        assert "U525" in command("write", *words, "--overwrite", *option, code=1)
    with pytest.raises(PlanError, match="P122"), running(loaded.model, "0-3"):
        pass


VERBS = ("measure", "prune", "heal", "compare", "calibrate", "fit_exits", "bench_policy", "redundancy")


@pytest.mark.parametrize("verb", VERBS)
def test_what_plans_measures_or_trains_wants_the_base(verb: str, tmp_path: Path) -> None:
    """From Python too, and before anything is asked of the text."""
    written("llama", "0-1,2=1,3", tmp_path / "one")
    loaded = load(tmp_path / "one")
    calls: dict[str, Any] = {
        "measure": lambda: measure(loaded, "block-influence"),
        "prune": lambda: prune(loaded, drop=1),
        "heal": lambda: heal(loaded, "0-2", tokens=64),
        "compare": lambda: compare(loaded, tmp_path / "c", methods=["shortgpt"]),
        "calibrate": lambda: calibrate(loaded),
        "fit_exits": lambda: fit_exits(loaded),
        "bench_policy": lambda: bench_policy(loaded, "exit:after=1"),
        "redundancy": lambda: redundancy(loaded),
    }
    with pytest.raises(ModelError, match="is a planned checkpoint") as caught:
        calls[verb]()
    assert caught.value.code == "M382"


def test_what_no_planned_checkpoint_holds_is_refused(tmp_path: Path) -> None:
    from .kinds import kind

    with pytest.raises(WriteError) as other:
        write_planned(Loaded(copy.deepcopy(kind("bert")), None, "bert"), "0-2", tmp_path / "one")
    assert other.value.code == "W275"
    with pytest.raises(WriteError) as gated:
        write_planned(Loaded(own("llama"), None, "tiny"), "0-1,2?g,3", tmp_path / "two")
    assert gated.value.code == "P125"
    written("llama", "0-1,2=1,3", tmp_path / "three")
    with pytest.raises(ModelError) as several:
        AutoModelForCausalLM.from_pretrained(tmp_path / "three", device_map={"model": "cpu", "lm_head": "disk"})
    assert several.value.code == "M384"
    file = tmp_path / "three" / "config.json"
    config = json.loads(file.read_text())
    good = config["base"]
    for base in (
        {**good, "model_type": "unheard-of"},
        {**good, "model_type": "vit"},
        {**good, "hidden_size": "x"},
        [3],
        {},
    ):
        file.write_text(json.dumps(config | {"base": base}))
        with pytest.raises(ModelError) as unknown:
            load(tmp_path / "three")
        assert unknown.value.code == "M383"
    assert not (tmp_path / "one").exists() and not (tmp_path / "two").exists()
