"""Models that accelerate spreads over the CPU and the disk: the same logits and figures, plans live on them, and each
map that cannot be is one sentence before a weight is read."""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from shoal.api.assess import evaluate
from shoal.api.heal import heal
from shoal.api.measuring import measure
from shoal.api.prune import prune
from shoal.cli import app
from shoal.errors import ModelError, ShoalError, UsageError
from shoal.live import running
from shoal.models import placed as placed_module
from shoal.models.load import Loaded, load
from shoal.models.placed import is_offloaded, is_placed, placed_devices
from shoal.models.stacks import find_stack

from .families import FAMILIES, tiny
from .shares import only
from .test_api import model_folder

EXPERTS = {"mixtral"}
"""transformers puts their experts together while it loads, so that they lie in no file in that form."""
SOME = only({"llama", "gpt2", "bloom", "jamba", "gemma3n_text", "deepseek_v3"} | EXPERTS, sorted(FAMILIES))
PLANS = ("0-1,3", "0,1x2,2-3", "0,2,1,3", "0-1,2@1,3", "0-1,2@a1,3", "0-1,2=1,3", "0,~1-2,3", "0,(1|2),3", "0,1:x,2-3")
IDS = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))
ASKED: dict[str, Any] = {"length": 24, "limit": 4, "batch": 2}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def half_on_disk(model: Any) -> dict[str, str]:
    """Every second layer on the disk, everything else on the CPU."""
    stack = find_stack(model)
    return {"": "cpu"} | {f"{stack.path}.{i}": "disk" for i in range(0, stack.depth, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Loaded:
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def spread(folder: Path, whole: Loaded) -> Loaded:
    return load(folder, device_map=half_on_disk(whole.model))


@pytest.mark.parametrize("family", SOME)
def test_a_spread_model_makes_the_logits_of_one_in_memory(family: str, tmp_path: Path) -> None:
    base = tiny(family, "eager").eval()
    base.save_pretrained(tmp_path)
    held = load(tmp_path, device="cpu", attention="eager").model
    model = load(tmp_path, device_map=half_on_disk(base), attention="eager").model
    assert is_offloaded(model) and is_placed(model) and set(placed_devices(model)) == {"cpu", "disk"}
    assert torch.equal(logits(model), logits(held))
    hidden = find_stack(base).config.get_text_config(decoder=True).hidden_size
    own = {f"x.{name}": p * 1.2 for name, p in find_stack(held).layer(1).named_parameters() if p.dim() > 1}
    for plan in PLANS:
        weights = {"map-1-2.weight": torch.eye(hidden) * 1.5} if "~" in plan else own if ":x" in plan else None
        refused, found = [], []
        for one in (held, model):
            try:
                with running(one, plan, weights):
                    found.append(logits(one))
            except ShoalError as error:
                refused.append(error.code)
        assert not refused or refused == [refused[0]] * 2, plan
        assert refused or torch.equal(*found), plan


def test_weights_in_another_form_than_the_files_go_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "aside").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "aside"))
    base = tiny("mixtral").eval()
    base.save_pretrained(tmp_path / "model")
    for how in ({"stream": True, "device": "cpu"}, {"device_map": half_on_disk(base)}):
        loaded = load(tmp_path / "model", **how)
        assert any((tmp_path / "aside").rglob("*.safetensors"))
        assert torch.equal(logits(loaded.model), logits(base))
        del loaded
        gc.collect()
        assert not any((tmp_path / "aside").iterdir())


def test_a_map_of_one_device_is_that_device(folder: Path, whole: Loaded) -> None:
    for asked in ("cpu", {"": "cpu"}):
        model = load(folder, device_map=asked).model
        assert not is_placed(model) and torch.equal(logits(model), logits(whole.model))
    for asked in ("auto", "balanced", "sequential"):
        assert torch.equal(logits(load(folder, device_map=asked).model).cpu(), logits(whole.model))


def test_everything_may_lie_on_the_disk(folder: Path, whole: Loaded) -> None:
    model = load(folder, device_map={"": "disk"}).model
    assert torch.equal(logits(model), logits(whole.model))


def test_another_dtype_than_that_of_the_files(folder: Path, spread: Loaded) -> None:
    held = load(folder, device="cpu", dtype="bfloat16").model
    model = load(folder, device_map=half_on_disk(held), dtype="bfloat16").model
    assert model.dtype == torch.bfloat16 and torch.equal(logits(model), logits(held))


def test_layer_10_is_not_where_layer_1_is(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=11)).save_pretrained(tmp_path)
    model = load(tmp_path, device_map={"": "cpu", "model.layers.1": "disk"}).model
    away = [i for i in range(11) if any(p.is_meta for p in find_stack(model).layer(i).parameters())]
    assert away == [1]


def test_measures_searches_and_evaluations_are_those_of_one_device(whole: Loaded, spread: Loaded) -> None:
    for name in ("block-influence", "loss-removed"):
        one, other = (measure(model, name, **ASKED) for model in (whole, spread))
        assert str(one) == str(other)
    one, other = (prune(model, method="sleb", drop=2, **ASKED) for model in (whole, spread))
    assert str(one.plan) == str(other.plan)
    how: dict[str, Any] = {"plan": "0-1,3-4", "window": 24, "limit": 3, "new_tokens": 4}
    one, other = (evaluate(model, **how).to_dict() for model in (whole, spread))
    assert one == other


def test_verbs_take_a_map_from_a_file(folder: Path, whole: Loaded, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(half_on_disk(whole.model)))
    placed = ["--device-map", str(tmp_path / "map.json")]
    verbs = {
        "measure": ["--length", "24", "--limit", "2"],
        "evaluate": ["--window", "24", "--limit", "2", "--new-tokens", "3", "--plan", "0-1,3-4"],
        "generate": ["a text", "--max-new-tokens", "4", "--raw", "--plan", "0-2,4"],
    }
    for verb, more in verbs.items():
        text = [more.pop(0)] if verb == "generate" else []
        asked = [verb, str(folder), *text, *more, "-q", "--json"]
        told = [CliRunner().invoke(app, [*asked, *how]) for how in ([], placed)]
        assert told[1].exit_code == 0, told[1].output
        one, other = (json.loads(done.stdout) for done in told)
        assert _without_times(one) == _without_times(other), verb


def _without_times(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _without_times(value) for key, value in found.items() if "second" not in key and "time" not in key}
    return found


def test_what_is_pruned_on_a_spread_model_is_written_from_its_files(
    folder: Path, whole: Loaded, tmp_path: Path
) -> None:
    (tmp_path / "map.json").write_text(json.dumps(half_on_disk(whole.model)))
    asked = ["prune", str(folder), "--drop", "2", "--length", "24", "--limit", "2", "-q", "--json", "--no-assess"]
    done = CliRunner().invoke(
        app, [*asked, "--device-map", str(tmp_path / "map.json"), "--output", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    with running(whole.model, json.loads(done.stdout)["plan"]):
        assert torch.equal(logits(load(tmp_path / "out", device="cpu").model), logits(whole.model))


def test_healing_by_gradients_of_the_whole_is_refused(spread: Loaded) -> None:
    with pytest.raises(UsageError, match=r"U737.*--with refit"):
        heal(spread, "0-1,3-4", tokens=100)


BAD: dict[str, tuple[Any, str]] = {
    "no such word": ("best", r"M387: .*'best', which is no device.*use auto, balanced"),
    "two GPUs on a machine with none": ({"": "cpu", "model.layers.1": "xla:1"}, r"M388.*model\.layers\.1 on 'xla:1'"),
    "by number": ({"": 99}, r"M388.*everything on 99"),
    "no such module": ({"": "cpu", "model.layer.1": "disk"}, r"M389.*'model\.layer\.1'"),
    "a part left out": ({"model": "cpu"}, r"M389.*nothing of lm_head"),
    "everything on the disk, spelled so": ("disk", r"M387"),
    "no device": ({"": None}, r"M387.*None"),
    "a list": ({"": ["cpu"]}, r"M387"),
    "no name": ({1: "cpu"}, r"M387"),
    "no file": ("nowhere.json", r"M387.*nowhere\.json cannot be read"),
    "not in words": ({"": "cp u"}, r"M38[78]"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_map_that_cannot_be_is_one_sentence(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, words = BAD[name]
    monkeypatch.setattr("shoal.models.load._from_pretrained", None)  # no weight is read
    with pytest.raises(ModelError, match=words) as said:
        load(folder, device_map=asked)
    assert "\n" not in str(said.value)


def test_a_layer_runs_on_one_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placed_module, "_require_device", lambda *_: None)
    split = {"": 0, "model.layers.3.mlp": 1}
    with pytest.raises(ModelError, match=r"M390.*decoder layer 3 on 0 and 1; a layer runs on one device"):
        load(folder, device_map=split)


def test_files_that_hold_no_map(folder: Path, tmp_path: Path) -> None:
    for number, text in enumerate(("[]", "{}", '"cpu"', "{", '{"": 1.5}', "\0", "[" * 9999)):
        file = tmp_path / f"{number}.json"
        file.write_text(text)
        with pytest.raises(ModelError, match="M387"):
            load(folder, device_map=file)


def test_what_does_not_go_with_a_map(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for more in ({"device": "cpu"}, {"stream": True}):
        with pytest.raises(UsageError, match=r"U736.*give one of them"):
            load(folder, device_map="auto", **more)
    monkeypatch.setattr(placed_module, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"M386.*pip install"):
        load(folder, device_map="auto")
