"""Folders broken as other tools break them: the doctor names what is wrong, and the repair computes what it should."""

from __future__ import annotations

import importlib
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from shoal.api.doctor import doctor, layer_list
from shoal.errors import ModelError, ShoalNote, UsageError, WriteError
from shoal.models.load import load
from shoal.models.shards import stored_tensors
from shoal.plan import load_plan
from shoal.writing.proof import verify
from shoal.writing.repair import repair

from .broken import (
    UP,
    WHOLE,
    Break,
    all_of,
    config_of,
    edit_index,
    folders,
    no_note,
    numbered,
    saved,
    set_config,
    shoal,
    stale,
    tensors_of,
)
from .families import tiny
from .shares import only

__all__ = ["folders"]

BROKEN: dict[str, tuple[str, Break, str, str | None]] = {
    "a depth that is too large": ("llama", lambda d: set_config(d, num_hidden_layers=7), "num_hidden_layers", None),
    "a depth that is too small": ("llama", lambda d: set_config(d, num_hidden_layers=2), "num_hidden_layers", None),
    "layers with their old numbers": ("llama", numbered, "the numbering of the layers", None),
    "old numbers and a stale config": (
        "gemma3_text",
        all_of(numbered, stale(*WHOLE), no_note),
        "layer_types",
        None,
    ),
    "old numbers, only the depth mended": ("gemma3_text", all_of(numbered, stale("layer_types")), "layer_types", None),
    "a stale list and the lineage": ("gemma3_text", stale("layer_types"), "layer_types", None),
    "a stale list and a person who knows": (
        "gemma3_text",
        all_of(stale("layer_types"), no_note),
        "layer_types",
        "0,2-3",
    ),
    "a stale list that says one thing only": (
        "qwen3",
        all_of(stale("layer_types"), no_note),
        "layer_types",
        None,
    ),
    "two stale lists": ("smollm3", stale("layer_types", "no_rope_layers"), "no_rope_layers", None),
    "experts in the wrong layers": (
        "qwen2_moe",
        stale("mlp_only_layers", "decoder_sparse_step"),
        "mlp_only_layers",
        None,
    ),
    "dense layers in the wrong places": (
        "deepseek_v3",
        all_of(lambda d: set_config(d, first_k_dense_replace=3), no_note),
        "first_k_dense_replace",
        None,
    ),
    "kinds in another order": (
        "nemotron_h",
        lambda d: set_config(d, layers_block_type=config_of(d)["layers_block_type"][::-1]),
        "layers_block_type",
        None,
    ),
    "an index with a ghost": (
        "llama",
        lambda d: edit_index(d, lambda m: m.update({"ghost.weight": m[UP]})),
        "the index entry of ghost.weight",
        None,
    ),
    "an index that forgot a tensor": (
        "llama",
        lambda d: edit_index(d, lambda m: m.pop(UP)),
        f"the index entry of {UP}",
        None,
    ),
    "an index that names another file": (
        "llama",
        lambda d: edit_index(d, lambda m: m.update({UP: next(f for f in m.values() if f != m[UP])})),
        f"the index entry of {UP}",
        None,
    ),
    "a tensor left over": (
        "llama",
        lambda d: saved(d, lambda t: t.update({"score.weight": torch.ones(2)})),
        "the tensor score.weight",
        None,
    ),
    "a tensor left over in a layer": (
        "llama",
        lambda d: saved(d, lambda t: t.update({"model.layers.1.mlp.gate.scale": torch.ones(2)})),
        "the tensor model.layers.1.mlp.gate.scale",
        None,
    ),
    "a tied head said to be untied": (
        "gpt2",
        lambda d: set_config(d, tie_word_embeddings=False),
        "tie_word_embeddings",
        None,
    ),
    "a tied head that is there all the same": (
        "gpt2",
        lambda d: saved(d, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()})),
        "the tensor lm_head.weight",
        None,
    ),
}


def logits(folder: Path) -> torch.Tensor:
    ids = torch.arange(12).view(1, -1) * 5 % 64
    model, info = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits
    return found


LONG = {"a depth that is too small", "old numbers, only the depth mended", "a stale list that says one thing only"}
LONG |= {"two stale lists", "kinds in another order", "an index that names another file", "a tensor left over"}
LONG |= {"dense layers in the wrong places", "a depth that is too large", "an index with a ghost"}
UNREAD = {"a stale list and the lineage", "a stale list and a person who knows"}
"""A config that transformers does not accept hides the tokenizer too."""


@pytest.mark.parametrize("name", only(BROKEN.keys() - LONG, BROKEN))
def test_a_broken_folder_is_named_and_repaired(name: str, folders: Any, tmp_path: Path) -> None:
    family, change, field, kept = BROKEN[name]
    base, sound = folders(family)
    assert doctor(sound).diagnosis.findings == ()
    broken = tmp_path / "broken"
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(sound, broken)
    change(broken)
    seen = doctor(broken, kept=kept)
    assert field in [finding.what.partition(" (and")[0] for finding in seen.diagnosis.findings], seen.diagnosis.findings
    assert not seen.diagnosis.unrepairable
    if seen.diagnosis.broken:
        with pytest.raises(ModelError, match="M335"):
            seen.require_sound()
    noted = pytest.warns(ShoalNote, match="the tokenizer in .* cannot be read") if name in UNREAD else nullcontext()
    with noted:
        made = repair(broken, tmp_path / "repaired", kept=None if kept is None else layer_list(kept))
    assert made.proof.passed
    assert doctor(made.folder).diagnosis.findings == ()
    assert torch.equal(logits(made.folder), logits(sound))
    assert {n: t.shape for n, t in tensors_of(made.folder).items()} == {
        n: t.shape for n, t in tensors_of(sound).items()
    }
    assert config_of(made.folder).keys() >= config_of(sound).keys() - {"shoal"}


def test_a_repaired_folder_verifies_and_remembers_its_layers(folders: Any, tmp_path: Path) -> None:
    base, sound = folders("gemma3_text")
    shutil.copytree(sound, tmp_path / "broken")
    set_config(tmp_path / "broken", layer_types=config_of(base)["layer_types"], num_hidden_layers=4)
    numbered(tmp_path / "broken")
    out = str(tmp_path / "out")
    said = shoal("doctor", str(tmp_path / "broken"), "--repair", out, "--json")
    assert json.loads(said)["repaired"] == out
    proof = verify(out)
    assert proof.passed, proof.failures
    assert str(load_plan(out)) == "0,2-3"
    assert config_of(Path(out))["shoal"]["base_layers"] == [0, 2, 3]
    assert json.loads((Path(out) / "shoal" / "records.jsonl").read_text())["what"] == "repair"
    assert "W220" in shoal("doctor", str(tmp_path / "broken"), "--repair", out, code=1)


def test_lineage_is_composed_through_a_repair(folders: Any, tmp_path: Path) -> None:
    """The sound folder has layers 0, 2 and 3 of its base; another tool then takes away its layer 1, which is 2."""
    _, sound = folders("llama")
    shutil.copytree(sound, tmp_path / "broken")
    saved(tmp_path / "broken", lambda t: {n: v for n, v in t.items() if ".layers.1." not in n})
    made = repair(tmp_path / "broken", tmp_path / "out")
    assert config_of(made.folder)["shoal"]["base_layers"] == [0, 3]


def untied(folder: Path) -> None:
    saved(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}))


def test_bytes_decide_whether_a_head_is_tied(folders: Any, tmp_path: Path) -> None:
    shutil.copytree(folders("gpt2")[1], tmp_path / "broken")
    untied(tmp_path / "broken")
    made = repair(tmp_path / "broken", tmp_path / "out")
    assert config_of(made.folder)["tie_word_embeddings"] is False
    model = load(made.folder, device="cpu").model.state_dict()
    assert torch.equal(model["lm_head.weight"], model["transformer.wte.weight"] + 1)


HOPELESS: dict[str, tuple[str, Break, str]] = {
    "a stale list that nobody can know": ("gemma3_text", all_of(stale("layer_types"), no_note), "layer_types"),
    "a missing tensor": ("llama", lambda d: saved(d, lambda t: t.pop(UP)), "mlp.up_proj.weight of layer 1"),
    "a missing norm": ("llama", lambda d: saved(d, lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "a turned tensor": ("llama", lambda d: saved(d, lambda t: t.update({UP: torch.zeros(32, 64)})), UP),
    "another width outside": (
        "llama",
        lambda d: saved(d, lambda t: t.update({"model.norm.weight": torch.zeros(5)})),
        "model.norm.weight",
    ),
    "a missing shard": ("llama", lambda d: stored_tensors(d)[UP].file.unlink(), "the file model-0"),
    "a tensor in two files": (
        "llama",
        lambda d: save_file({UP: torch.zeros(64, 32), "x": torch.ones(1)}, d / "model-00009-of-00009.safetensors"),
        f"the tensor {UP}",
    ),
}


@pytest.mark.parametrize("count", [1, 3])
def test_layers_that_share_kv_are_known_by_their_tensors(count: int, tmp_path: Path) -> None:
    """Gemma 3n's last two layers have no keys of their own; with 3 of 4 transformers does not even build the model."""
    tiny("gemma3n_text", "eager").save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "broken")
    set_config(tmp_path / "broken", num_kv_shared_layers=count)
    seen = doctor(tmp_path / "broken")
    assert [f"{finding}" for finding in seen.diagnosis.findings] == [f"num_kv_shared_layers is {count}, should be 2"]
    made = repair(tmp_path / "broken", tmp_path / "out")
    assert torch.equal(logits(made.folder), logits(tmp_path / "base"))


def test_fields_that_tensors_do_not_show_stay(folders: Any, tmp_path: Path) -> None:
    """A layer whose experts fit another place must not get that place's kind of attention with them."""
    _, sound = folders("qwen2_moe")
    shutil.copytree(sound, tmp_path / "broken")
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    fields = {"layer_types": kinds, "sliding_window": 4, "use_sliding_window": True}
    set_config(tmp_path / "broken", **fields, mlp_only_layers=[1, 2], decoder_sparse_step=1)
    seen = doctor(tmp_path / "broken")
    assert [finding.what for finding in seen.diagnosis.findings] == ["mlp_only_layers"]
    assert seen.diagnosis.config is not None
    assert seen.diagnosis.config.layer_types == kinds


def test_several_stacks_are_compared_as_a_whole(folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal.models.stacks import find_stacks

    for name in ("shoal.models.diagnosis.diagnose", "shoal.writing.repair"):
        monkeypatch.setattr(importlib.import_module(name), "find_stacks", lambda model: find_stacks(model) * 2)
    _, sound = folders("llama")
    assert doctor(sound).diagnosis.findings == ()
    shutil.copytree(sound, tmp_path / "broken")
    edit_index(tmp_path / "broken", lambda m: m.pop(UP))
    with pytest.raises(WriteError, match="W252"):
        repair(tmp_path / "broken", tmp_path / "out")
    saved(tmp_path / "broken", lambda t: t.update({UP: torch.zeros(32, 64)}))
    with pytest.raises(WriteError, match=r"W250.*up_proj.*\[32, 64\]"):
        repair(tmp_path / "broken", tmp_path / "out")


@pytest.mark.parametrize("name", HOPELESS)
def test_what_cannot_be_known_is_refused(name: str, folders: Any, tmp_path: Path) -> None:
    family, change, field = HOPELESS[name]
    base, sound = folders(family)
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(sound, tmp_path / "broken")
    change(tmp_path / "broken")
    seen = doctor(tmp_path / "broken")
    assert any(field in finding.what for finding in seen.diagnosis.unrepairable), seen.diagnosis.findings
    with pytest.raises(WriteError, match="W250") as caught:
        repair(tmp_path / "broken", tmp_path / "out")
    assert ("--kept" in str(caught.value)) == ("nobody" in name)
    assert not (tmp_path / "out").exists()


def test_refused_repairs(folders: Any, tmp_path: Path) -> None:
    base, sound = folders("gemma3_text")
    with pytest.raises(WriteError, match="W251"):
        repair(sound, tmp_path / "out")
    shutil.copytree(sound, tmp_path / "broken")
    set_config(tmp_path / "broken", layer_types=config_of(base)["layer_types"], quantization_config=None)
    for kept in ("0-1", "0,2,9"):
        with pytest.raises(ModelError, match="M334"):
            repair(tmp_path / "broken", tmp_path / "out", kept=layer_list(kept))
    for text in ("0,1a", "0,~1-2", "(0|1)"):
        with pytest.raises(UsageError, match="U527"):
            layer_list(text)
    set_config(tmp_path / "broken", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="M333"):
        doctor(tmp_path / "broken")
    for change, code in (
        ({"model_type": "nope"}, "M330"),
        ({"hidden_size": "x"}, "M330"),
    ):
        shutil.copy(sound / "config.json", tmp_path / "broken" / "config.json")
        set_config(tmp_path / "broken", **change)
        with pytest.raises(ModelError, match=code):
            doctor(tmp_path / "broken")
    shutil.copy(folders("gpt2")[1] / "config.json", tmp_path / "broken" / "config.json")
    with pytest.raises(ModelError, match="M331"):
        doctor(tmp_path / "broken")
