"""What is copied or written beside the tensors and counts or names layers: renumbered, left out, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from shoal.models.layer_references import GONE, Renumbering
from shoal.writing.papers import generation_for
from shoal.writing.references_check import references_check

from .broken import config_of, set_config, shoal
from .families import tiny

CODE = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
PLAN, KEPT = "0,2-3", (0, 2, 3)
KEYS: dict[str, tuple[Any, Any]] = {
    "drop_attn_list": ([1, 3], None),
    "drop_mlp_list": ([], None),
    "auto_map": (CODE, None),
    "eagle_layer_ids": ([1, 2, 3], [1, 2]),
    "skip_attn": ([1], None),
    "kept_whole": ([0, 1, 3], [0, 2]),
    "layer_scale": ([0.1, 0.2, 0.3, 0.4], [0.1, 0.3, 0.4]),
    "is_sparse": ([True, False, True, True], [True, True, True]),
    "block_configs": ([{"i": 0}, {"i": 1}, {"i": 2}, {"i": 3}], [{"i": 0}, {"i": 2}, {"i": 3}]),
    "layer_bits": ({"0": 4, "1": 8, "3": 2}, {"0": 4, "2": 2}),
    "not_converted": (["model.layers.1.mlp", "model.layers.3", "lm_head"], ["model.layers.2", "lm_head"]),
    "per_module": ({"model.layers.2.mlp": 1, "model.layers.1.mlp": 2, "x": 3}, {"model.layers.1.mlp": 1, "x": 3}),
    "n_layers": (4, 3),
    "exit_layer": (3, 2),
    "num_first_layers": (4, 3),
    "stops": ({"early": {"exit_layers": [1, 2]}}, {"early": {"exit_layers": [1]}}),
    # these say nothing of layers
    "special_token_ids": ([0, 1, 2], [0, 1, 2]),
    "kernel_sizes": ([3, 3, 3, 3], [3, 3, 3, 3]),
    "original_num_layers": (4, 4),
    "layers_per_group": (4, 4),
    "vocab_groups": (4, 4),
    "words": (["a", "b", "c", "d"], ["a", "b", "c", "d"]),
    "kinds": (["a", "b", "a", "a"], ["a", "a", "a"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "base"
    tiny("llama", "eager").save_pretrained(folder)
    set_config(folder, **{name: old for name, (old, _) in KEYS.items()})
    for name in ("configuration_x.py", "modeling_x.py"):
        (folder / name).write_text("raise SystemExit('never run')\n", encoding="utf-8")
    generation = {"exit_layer": 1, "kept_layers": [0, 1, 2], "special_ids": [0, 1, 2], "max_new_tokens": 4}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    papers = {"auto_map": {"AutoProcessor": "processing_x.X"}, "feature_layers": [1, 3], "image_size": 4}
    (folder / "processor_config.json").write_text(json.dumps(papers), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["loaded", "streamed"])
def written(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "out"
    how = ["--stream"] if request.param == "streamed" else []
    shoal("write", str(base), "--plan", PLAN, "--output", str(out), *how)
    return out


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_other_readers_obey_follow_the_layers(name: str, written: Path) -> None:
    new = KEYS[name][1]
    assert config_of(written).get(name) == new
    assert (name in config_of(written)) == (new is not None)


def test_other_papers_follow_the_layers(written: Path) -> None:
    found = json.loads((written / "generation_config.json").read_text(encoding="utf-8"))
    assert (found["kept_layers"], found["special_ids"], found["max_new_tokens"]) == ([0, 1], [0, 1, 2], 4)
    assert "exit_layer" not in found
    found = json.loads((written / "processor_config.json").read_text(encoding="utf-8"))
    assert found == {"feature_layers": [2], "image_size": 4}


def test_a_written_folder_loads_as_other_readers_load_it(written: Path) -> None:
    """With trust_remote_code, as harnesses, trainers and vLLM do; nothing of the base's code is there to be run."""
    assert AutoConfig.from_pretrained(written, trust_remote_code=True).num_hidden_layers == 3
    assert AutoModelForCausalLM.from_pretrained(written, trust_remote_code=True).config.num_hidden_layers == 3
    assert shoal("verify", str(written))


def test_what_llm_drop_wrote_is_not_taken_in_silence(base: Path) -> None:
    said = json.loads(shoal("doctor", str(base), "--json"))
    assert said["sound"]
    assert any("drop_attn_list drops the attention of layers 1, 3" in note for note in said["notes"])
    command = ["convert", str(base / "config.json"), "--from", "llm-drop", "--to", "notation", "--model", str(base)]
    assert shoal(*command).strip() == "0,1m,2,3m"


Break = Callable[[Path], object]
LOST: dict[str, tuple[Break, str]] = {
    "code of the model": (lambda d: set_config(d, auto_map=CODE), "configuration_x.X"),
    "code of the tokenizer": (
        lambda d: (d / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}})),
        "tokenizer_config.json: t.T",
    ),
    "a module": (lambda d: (d / "modules.json").write_text('[{"path": "1_Pooling", "type": ""}]'), "1_Pooling"),
    "code of a module": (lambda d: (d / "modules.json").write_text('[{"path": "", "type": "my.Kind"}]'), "my.Kind"),
    "layers": (lambda d: set_config(d, skip_layers=[7, 8]), "skip_layers"),
}


@pytest.mark.parametrize("name", LOST)
def test_the_proof_tries_every_reference(name: str, base: Path, tmp_path: Path) -> None:
    change, says = LOST[name]
    folder = tmp_path / "folder"
    shutil.copytree(base, folder)
    set_config(folder, auto_map=None)
    (folder / "processor_config.json").unlink()
    for file in folder.glob("*.py"):
        file.unlink()
    assert references_check(folder).passed, references_check(folder)
    change(folder)
    assert not references_check(folder).passed
    assert says in str(references_check(folder))


def test_layers_in_a_generation_config() -> None:
    """Whisper's alignment heads are pairs of a decoder layer and a head; DoLa's layers are outputs, 0 the embedding."""
    config = GenerationConfig(alignment_heads=[[1, 0], [2, 5], [3, 1]])
    places = Renumbering(4, KEPT, "model.decoder.layers")
    assert generation_for(config, places).alignment_heads == [[1, 5], [2, 1]]
    assert config.alignment_heads == [[1, 0], [2, 5], [3, 1]]
    early = generation_for(GenerationConfig(dola_layers=[1, 2, 4], assistant_early_exit=3), places)
    assert (early.dola_layers, early.assistant_early_exit) == ([1, 3], 2)
    none = generation_for(GenerationConfig(alignment_heads=[[1, 0]]), places)
    assert getattr(none, "alignment_heads", None) is None


def test_a_layer_that_runs_twice_is_named_twice() -> None:
    twice = Renumbering(4, (0, 1, 1, 3), "model.layers")
    assert twice.named("skip_layers", [1, 2]) == [1, 2]
    assert twice.named("modules", ["model.layers.1.mlp"]) == ["model.layers.1.mlp", "model.layers.2.mlp"]
    assert twice.named("modules", ["re:.*layers\\.3\\..*"]) == ["re:.*layers\\.3\\..*"]
    assert Renumbering(4, (0, 3), "model.layers").named("modules", ["re:.*layers\\.3\\.x"]) == ["re:.*layers\\.1\\.x"]
    assert twice.named("skip_layers", [2]) is GONE


def pooled(folder: Path, **config: object) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64}
    BertModel(BertConfig(num_hidden_layers=4, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"path": "1_Weighted", "type": "sentence_transformers.models.WeightedLayerPooling"})
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Weighted").mkdir()
    (folder / "1_Weighted" / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("how", [[], ["--stream"]])
def test_modules_beside_the_model_that_count_its_layers(how: list[str], tmp_path: Path) -> None:
    pooled(tmp_path / "counts", word_embedding_dimension=16, num_hidden_layers=4, layer_start=2)
    words = ["write", str(tmp_path / "counts"), "--output", str(tmp_path / "out"), *how]
    assert "W282" in shoal(*words, "--plan", "0,2-3", code=1)
    assert not (tmp_path / "out").exists()
    if not how:
        return
    pooled(tmp_path / "plain", word_embedding_dimension=16, pooling_mode_mean_tokens=True)
    shoal("write", str(tmp_path / "plain"), "--plan", "0,2-3", "--output", str(tmp_path / "out"), *how)
    assert (tmp_path / "out" / "1_Weighted" / "config.json").exists()
