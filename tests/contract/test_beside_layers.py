"""Tensors that look like layers and are none, and leftovers of old versions: sound, carried or left out by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from shoal.errors import ShoalNote
from shoal.models.beside_layers import announced
from shoal.writing.proof import verify

from .broken import Tensors, config_of, saved, set_config, shoal, tensors_of
from .families import tiny
from .shares import every

Change = Callable[[Tensors], object]


def ahead(number: int, *, odd: bool = True, at: str = "model.layers.") -> Change:
    """A copy of the last layer under `number`, with or without tensors that no layer has."""

    def change(tensors: Tensors) -> None:
        last = max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
        start = f"model.layers.{last}."
        for name in [name for name in tensors if name.startswith(start)]:
            tensors[f"{at}{number}.{name[len(start) :]}"] = tensors[name] + 1
        if odd:
            tensors[f"{at}{number}.eh_proj.weight"] = torch.ones(4, 8)
            tensors[f"{at}{number}.shared_head.head.weight"] = torch.ones(8, 4)

    return change


def logits(folder: Path, auto: Any = AutoModelForCausalLM) -> torch.Tensor:
    model = auto.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(12).view(1, -1) * 5 % 64)[0]
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("bases")

    def made(family: str) -> Path:
        if not (root / family).exists():
            tiny(family, "eager").save_pretrained(root / family)
        return root / family

    return made


AHEAD: dict[str, tuple[str, Change, dict[str, Any]]] = {
    "DeepSeek's layout": ("deepseek_v3", ahead(4), {"num_nextn_predict_layers": 1}),
    "a layer like all others": ("llama", ahead(4, odd=False), {"num_nextn_predict_layers": 1}),
    "two, under a key of its own": (
        "llama",
        lambda t: [ahead(4)(t), ahead(5)(t)],
        {"num_mtp_modules": 2, "mtp_hidden_size": 16},
    ),
    "MiMo's layout": ("llama", ahead(0, at="model.mtp_layers."), {"num_nextn_predict_layers": 1}),
    "Qwen3-Next's layout": ("qwen3", ahead(0, at="mtp.layers."), {"mtp_num_hidden_layers": 1}),
}


@pytest.mark.parametrize("name", every(2, AHEAD))
def test_layers_that_predict_further_ahead_are_no_layers(name: str, bases: Any, tmp_path: Path) -> None:
    family, change, keys = AHEAD[name]
    base = tmp_path / "base"
    shutil.copytree(bases(family), base)
    saved(base, change)
    set_config(base, **keys)
    said = json.loads(shoal("doctor", str(base), "--json"))
    assert said["sound"], said["findings"]
    assert said["layers"] == {"decoder": 4}
    assert json.loads(shoal("inspect", str(base), "--json"))["stacks"][0]["layers"][-1]["index"] == 3
    ways = [["--stream"], *([[]] if family == "deepseek_v3" else [])]  # a proof in a fresh process takes seconds
    for how in ways:
        out = tmp_path / f"out{len(how)}"
        text = shoal("write", str(base), "--plan", "0,2-3", "--output", str(out), *how)
        assert "left out, as no part of the model: " in text
        assert not announced(config_of(out))
        assert set(keys) <= config_of(out).keys()
        assert "## Left out" in (out / "README.md").read_text(encoding="utf-8")
    if len(ways) > 1:
        assert tensors_of(tmp_path / "out0").keys() == tensors_of(tmp_path / "out1").keys()
        assert torch.equal(logits(tmp_path / "out0"), logits(tmp_path / "out1"))


def test_a_repair_carries_what_a_key_announces(bases: Any, tmp_path: Path) -> None:
    """Layer 1 was deleted the plain way; the layer that predicts ahead kept its number 4 and is 3 afterwards."""
    base = tmp_path / "base"
    shutil.copytree(bases("deepseek_v3"), base)
    saved(base, ahead(4))
    set_config(base, num_nextn_predict_layers=1)
    shoal("doctor", str(base), "--repair", str(tmp_path / "same"))
    assert tensors_of(tmp_path / "same").keys() == tensors_of(base).keys()
    assert torch.equal(logits(tmp_path / "same"), logits(base))
    with pytest.warns(ShoalNote, match="holds 28 tensors that no part"):
        assert verify(tmp_path / "same").passed
    saved(base, lambda t: {n: v for n, v in t.items() if ".layers.1." not in n})
    assert "the numbering of the layers" in shoal("doctor", str(base), code=1)
    shoal("doctor", str(base), "--repair", str(tmp_path / "out"))
    out = tensors_of(tmp_path / "out")
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 3
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 1
    assert torch.equal(out["model.layers.3.eh_proj.weight"], torch.ones(4, 8))
    assert torch.equal(
        out["model.layers.2.input_layernorm.weight"], tensors_of(base)["model.layers.3.input_layernorm.weight"]
    )


def test_a_layer_that_nothing_announces_is_a_layer(bases: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    saved(base, ahead(4, odd=False))
    assert "num_hidden_layers" in shoal("doctor", str(base), code=1)
    assert "M313" in shoal("inspect", str(base), code=1)


BERT = {"embeddings.position_ids": torch.arange(8)[None]}
LEFT: dict[str, tuple[str, Tensors]] = {
    "positions": ("bert", BERT),
    "a pooler and another head": ("llama", {"pooler.dense.weight": torch.ones(4, 4), "score.weight": torch.ones(2, 8)}),
    "rotary tables": ("llama", {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)}),
    "masks as bytes": ("llama", {"model.layers.1.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}),
    "masks as numbers": ("llama", {"model.layers.1.self_attn.table": torch.ones(1, 1, 8, 8)}),
    "a mask's value": ("llama", {"model.layers.1.self_attn.masked_bias": torch.tensor(-1e9)}),
    "GPT-2's masks": ("gpt2", {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}),
}


@pytest.mark.parametrize("name", every(2, LEFT))
def test_leftovers_are_a_note(name: str, bases: Any, tmp_path: Path) -> None:
    family, more = LEFT[name]
    base = tmp_path / "base"
    if family == "bert":
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64}
        BertModel(BertConfig(num_hidden_layers=4, max_position_embeddings=32, **sizes)).save_pretrained(base)
    else:
        shutil.copytree(bases(family), base)
    saved(base, lambda t: t.update(more))
    said = json.loads(shoal("doctor", str(base), "--json"))
    assert said["sound"]
    assert next(iter(more)) in json.dumps([said["notes"], said["findings"]])
    assert all(not finding["breaks"] for finding in said["findings"])
    out = tmp_path / "out"
    text = shoal("write", str(base), "--plan", "0,2-3", "--output", str(out), "--stream")
    assert next(iter(more)) in text
    assert not tensors_of(out).keys() & more.keys()
    auto = AutoModel if family == "bert" else AutoModelForCausalLM
    assert logits(out, auto).isfinite().all()


def test_a_weight_without_a_place_in_a_layer_stays_broken(bases: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("llama"), base)
    saved(base, lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(8)}))
    assert "q_proj.bias" in shoal("doctor", str(base), code=1)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"num_nextn_predict_layers": 1}, {"num_nextn_predict_layers": 1}),
        ({"num_mtp_layers": 3, "mtp_hidden_size": 12}, {"num_mtp_layers": 3}),
        ({"mtp_num_hidden_layers": 1}, {"mtp_num_hidden_layers": 1}),
        ({"num_nextn_predict_layers": 0, "num_hidden_layers": 4, "mtp_loss_weight": 1}, {}),
        ({"num_mtp_layers": True, "n_predict": 5, "mtp_layer_types": [1]}, {}),
    ],
)
def test_keys_that_announce_layers(config: dict[str, Any], found: dict[str, int]) -> None:
    assert announced(config) == found
