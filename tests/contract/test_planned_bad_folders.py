"""Planned checkpoints that were edited, cut off or put together from two: one sentence with a code, and no model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import shoal.auto  # noqa: F401 - tells transformers of planned checkpoints
from shoal.errors import ShoalError
from shoal.models.load import Loaded, load
from shoal.models.shards import check_folder
from shoal.writing.planned_folder import write_planned

from .families import tiny
from .test_cli import shoal as command

Edit = Callable[[Path], None]


def written(out: Path, plan: str = "0-3", family: str = "llama", **more: Any) -> Path:
    model = tiny(family, "sdpa" if family == "llama" else "eager")
    write_planned(Loaded(model, None, "tiny"), plan, out, prove=False, **more)
    return out


def config(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def steps(*pieces: str) -> Edit:
    """Other steps, with the hash taken away, as the sentence about the hash tells people to do."""

    def change(content: dict[str, Any]) -> None:
        content["plan"]["stacks"] = {"decoder": list(pieces)}
        del content["plan"]["hash"]

    return config(change)


def plan_with(**fields: Any) -> Edit:
    return config(lambda content: content["plan"].update(fields))


def base_with(**fields: Any) -> Edit:
    return config(lambda content: content["base"].update(fields))


def base_of(depth: int) -> Edit:
    def change(content: dict[str, Any]) -> None:
        content["plan"]["base"]["stacks"] = {"decoder": depth}
        del content["plan"]["hash"]

    return config(change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        held = load_file(folder / "planned.safetensors")
        change(held)
        save_file(held, folder / "planned.safetensors", {"format": "pt"})

    return edit


def put(name: str, tensor: torch.Tensor) -> Edit:
    return tensors(lambda held: held.update({name: tensor}))


def untied(folder: Path) -> None:
    tensors(lambda held: held.update({"lm_head.weight": 1 + held["model.embed_tokens.weight"]}))(folder)


def no_generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[]")


def beside(folder: Path) -> None:
    held = load_file(folder / "planned.safetensors")
    save_file({NORM: held[NORM] + 1}, folder / "more.safetensors", {"format": "pt"})


def cut(size: int) -> Edit:
    """All but the last `size` bytes."""

    def edit(folder: Path) -> None:
        content = (folder / "planned.safetensors").read_bytes()
        (folder / "planned.safetensors").write_bytes(content[:-size])

    return edit


def without_shard(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        for name in ("planned-00003-of-00022.safetensors", *names):
            (folder / name).unlink()

    return edit


NORM = "model.norm.weight"
SHARDS: dict[str, Any] = {"shard_size": "10KB"}
INDEX = "planned.safetensors.index.json"
CASES: dict[str, tuple[str, str, Edit, dict[str, Any]]] = {
    "steps, and the old hash": ("N001", "edited by hand", plan_with(stacks={"decoder": ["0-2"]}), {}),
    "a layer that is not there": ("N001", "its layers are 0 to 3", steps("0-4"), {}),
    "a layer without tensors": ("M310", "lacks the tensor model.layers.2.", steps("0-3"), {"plan": "0-1,3"}),
    "new tensors that are not there": ("P112", "'ghost'", steps("0-2", "3:ghost"), {}),
    "tensors of a layer that does not run": ("M400", "which no run of its plan reads", steps("0-1", "3"), {}),
    "a tie, and matrices of its own": ("M400", "model.layers.2.mlp.down_proj.weight", steps("0-1", "2=1", "3"), {}),
    "a reader of KV, and keys of its own": ("M400", "model.layers.2.self_attn.k_proj", steps("0-1", "2@1", "3"), {}),
    "a source of KV behind its reader": ("P163", "runs later", steps("0", "1@3", "2-3"), {"family": "gpt_neo"}),
    "a source of KV that does not run": ("P107", "layer 2", steps("0-1", "3@2"), {"plan": "0-1,3"}),
    "a source of KV in a layer without": ("P109", "layer 3", steps("0-2", "3@1"), {"family": "mamba2"}),
    "half a layer that has no halves": ("P105", "layer 3", steps("0-2", "3a"), {"family": "mamba2"}),
    "a gate": ("P125", "3?g", steps("0-2", "3?g"), {}),
    "a plan of a deeper base": ("P101", "30 decoder layers", base_of(30), {}),
    "a deeper base": ("P101", "6 decoder layers", base_with(num_hidden_layers=6), {}),
    "a narrower base": ("M310", "instead of [32, 32]", base_with(intermediate_size=32), {}),
    "another vocabulary": ("M402", "vocab_size 64 and its base 70", base_with(vocab_size=70), {}),
    "a plan of a newer Shoal": ("N001", "install a newer Shoal", plan_with(format="shoal-plan/2"), {}),
    "a plan of another program": ("N001", "its format: 'x/1'", plan_with(format="x/1"), {}),
    "no plan": ("N001", "its format: none", config(lambda c: c.pop("plan")), {}),
    "a number for a plan": ("N001", "its format: none", config(lambda c: c.update(plan=3)), {}),
    "steps that are no list": ("N001", "must be a list", plan_with(stacks={"decoder": "0-3"}), {}),
    "steps of another stack": ("N001", "stacks decoder", plan_with(stacks={"encoder": ["0-3"]}), {}),
    "a tensor of another shape": ("M310", "as [3] instead of [32]", put(NORM, torch.ones(3)), {}),
    "whole numbers": ("M310", "torch.int64", put(NORM, torch.ones(32, dtype=torch.long)), {}),
    "a tensor of no model": ("M310", "holds the tensor more", put("more", torch.ones(3)), {}),
    "new tensors that no step names": ("M310", "shoal.a.weight", put("shoal.a.weight", torch.ones(3)), {}),
    "one tensor under two names": ("M400", "both are one tensor", untied, {"family": "gemma3_text"}),
    "a tensor in two files": ("M309", "twice", beside, {}),
    "a lost shard": ("M309", "planned-00003-of-00022", without_shard(), SHARDS),
    "a lost shard and no index": ("M310", "lacks the tensor", without_shard(INDEX), SHARDS),
    "a file that was cut off": ("M309", "not a complete safetensors file", cut(100), {}),
    "a file that was cut off in its header": ("M309", "its header does not fit", cut(168_000), {}),
    "no tensors": ("M309", "no weights", lambda folder: (folder / "planned.safetensors").unlink(), {}),
    "a damaged config for generation": ("M302", "generation_config", no_generation, {}),
}  # fmt: skip
"""By name: the code, what the sentence names, the damage, and how the sound folder was written."""


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_folder_is_one_sentence(name: str, tmp_path: Path) -> None:
    """By `shoal.load` and by the Auto class of transformers."""
    code, words, edit, how = CASES[name]
    folder = written(tmp_path / "one", **how)
    edit(folder)
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ShoalError) as caught:
            read(folder)
        assert caught.value.code == code, caught.value
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float33", 7])
def test_a_dtype_that_is_none(dtype: Any, tmp_path: Path) -> None:
    """transformers reads it before Shoal does, and falls over; `shoal.load` says so in one sentence."""
    folder = written(tmp_path / "one")
    config(lambda content: content.update(dtype=dtype))(folder)
    with pytest.raises(ShoalError, match="M307"):
        load(folder)


def test_the_command_line_says_one_sentence(tmp_path: Path) -> None:
    folder = written(tmp_path / "one")
    cut(100)(folder)
    text = command("generate", str(folder), "x", code=1)
    assert text.count("\n") == 1 and "M309" in text


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_checks_from_headers_know_the_names_of_its_files(size: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "m", shard_size=size)
    files = sorted(folder.glob("planned*.safetensors"))
    assert {place.file.name for place in check_folder(folder).values()} == {file.name for file in files}
    assert (len(files) > 1) == (size == "20KB")
    files[-1].unlink()
    with pytest.raises(ShoalError, match="M309"):
        check_folder(folder)
