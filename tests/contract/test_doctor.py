"""Folders broken as other tools break them: the doctor names what is wrong, and the repair computes what it should."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from shoal.api.doctor import doctor, layer_list
from shoal.cli import app
from shoal.errors import ModelError, PlanError, UsageError, WriteError
from shoal.models.load import inspect_source, load
from shoal.models.shards import INDEX, stored_tensors
from shoal.plan import Plan, load_plan, parse_plan
from shoal.writing.proof import verify
from shoal.writing.repair import repair
from shoal.writing.stream import stream

from .families import tiny

KEPT = (0, 2, 3)
Tensors = dict[str, torch.Tensor]
Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(the base with its 4 layers, the sound folder of its layers 0, 2 and 3) of a family."""
    root = tmp_path_factory.mktemp("folders")

    def made(family: str) -> tuple[Path, Path]:
        base, sound = root / f"{family}-base", root / family
        if not sound.exists():
            tiny(family, "eager").save_pretrained(base, max_shard_size="60KB")
            plan = parse_plan("0,2-3", Plan.identity(inspect_source(base)))
            stream(base, plan, sound, shard_size="20KB")
        return base, sound

    return made


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def set_config(folder: Path, **fields: Any) -> None:
    """None takes a field away."""
    new = {name: value for name, value in (config_of(folder) | fields).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(new), encoding="utf-8")


def stale(*names: str) -> Break:
    """The fields as they are in the base, from the folder beside."""

    def change(folder: Path) -> None:
        base = config_of(folder.parent / "base")
        set_config(folder, **{name: base[name] for name in names})

    return change


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def saved(folder: Path, change: Callable[[Tensors], object]) -> None:
    """The tensors, changed, in one file without an index."""
    tensors = tensors_of(folder)
    made = change(tensors)
    for file in (*folder.glob("*.safetensors"), *folder.glob(INDEX)):
        file.unlink()
    save_file(made if isinstance(made, dict) else tensors, folder / "model.safetensors", metadata={"format": "pt"})


def numbered(folder: Path) -> None:
    """The layers with the numbers of the base, as plain deletion leaves them."""

    def old(tensors: Tensors) -> Tensors:
        return {
            re.sub(r"(layers|h)\.(\d+)\.", lambda m: f"{m[1]}.{KEPT[int(m[2])]}.", n, count=1): t
            for n, t in tensors.items()
        }

    saved(folder, old)


def no_note(folder: Path) -> None:
    set_config(folder, shoal=None)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def all_of(*breaks: Break) -> Break:
    return lambda folder: [change(folder) for change in breaks]


UP = "model.layers.1.mlp.up_proj.weight"
WHOLE = ("num_hidden_layers", "layer_types")
BROKEN: dict[str, tuple[str, Break, str, str | None]] = {
    "a depth that is too large": ("llama", lambda d: set_config(d, num_hidden_layers=7), "num_hidden_layers", None),
    "a depth that is too small": ("llama", lambda d: set_config(d, num_hidden_layers=2), "num_hidden_layers", None),
    "layers with their old numbers": ("llama", numbered, "the numbers of the layers", None),
    "old numbers and a stale config": (
        "gemma3_text", all_of(numbered, stale(*WHOLE), no_note), "layer_types", None,
    ),
    "old numbers, only the depth mended": ("gemma3_text", all_of(numbered, stale("layer_types")), "layer_types", None),
    "a stale list and the lineage": ("gemma3_text", stale("layer_types"), "layer_types", None),
    "a stale list and a person who knows": ("gemma3_text", all_of(stale("layer_types"), no_note), "layer_types", "0,2-3"),
    "a stale list that says one thing only": (
        "qwen3", all_of(stale("layer_types"), no_note), "layer_types", None,
    ),
    "two stale lists": ("smollm3", stale("layer_types", "no_rope_layers"), "no_rope_layers", None),
    "experts in the wrong layers": (
        "qwen2_moe", stale("mlp_only_layers", "decoder_sparse_step"), "mlp_only_layers", None,
    ),
    "dense layers in the wrong places": (
        "deepseek_v3", all_of(lambda d: set_config(d, first_k_dense_replace=3), no_note), "first_k_dense_replace", None,
    ),
    "kinds in another order": (
        "nemotron_h",
        lambda d: set_config(d, layers_block_type=config_of(d)["layers_block_type"][::-1]),
        "layers_block_type",
        None,
    ),
    "an index with a ghost": ("llama", lambda d: edit_index(d, lambda m: m.update({"ghost.weight": m[UP]})), "the index entry of ghost.weight", None),
    "an index that forgot a tensor": ("llama", lambda d: edit_index(d, lambda m: m.pop(UP)), f"the index entry of {UP}", None),
    "an index that names another file": (
        "llama", lambda d: edit_index(d, lambda m: m.update({UP: next(f for f in m.values() if f != m[UP])})), f"the index entry of {UP}", None,
    ),
    "a tensor left over": ("llama", lambda d: saved(d, lambda t: t.update({"score.weight": torch.ones(2)})), "the tensor score.weight", None),
    "a tensor left over in a layer": (
        "llama", lambda d: saved(d, lambda t: t.update({"model.layers.1.mlp.gate.scale": torch.ones(2)})),
        "the tensor model.layers.1.mlp.gate.scale", None,
    ),
    "a tied head said to be untied": ("gpt2", lambda d: set_config(d, tie_word_embeddings=False), "tie_word_embeddings", None),
    "a tied head that is there all the same": (
        "gpt2", lambda d: saved(d, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()})), "the tensor lm_head.weight", None,
    ),
}  # fmt: skip


def logits(folder: Path) -> torch.Tensor:
    ids = torch.arange(12).view(1, -1) * 5 % 64
    model, info = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits
    return found


@pytest.mark.parametrize("name", BROKEN)
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
    assert not seen.diagnosis.hopeless
    if seen.diagnosis.broken:
        with pytest.raises(ModelError, match="M335"):
            seen.require_sound()
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


@pytest.mark.parametrize("name", HOPELESS)
def test_what_cannot_be_known_is_refused(name: str, folders: Any, tmp_path: Path) -> None:
    family, change, field = HOPELESS[name]
    base, sound = folders(family)
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(sound, tmp_path / "broken")
    change(tmp_path / "broken")
    seen = doctor(tmp_path / "broken")
    assert any(field in finding.what for finding in seen.diagnosis.hopeless), seen.diagnosis.findings
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
        ({"model_type": "vit"}, "M307"),
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


def test_what_a_plan_would_make(folders: Any) -> None:
    base, sound = folders("qwen2_moe")
    seen = doctor(base, plan="0,2-3").to_dict()["plan"]
    written = inspect_source(sound)
    assert seen["before"]["parameters"] == inspect_source(base).params
    assert seen["after"]["parameters"] == written.params
    assert seen["after"]["kv_bytes_per_token"] * 4 == seen["before"]["kv_bytes_per_token"] * 3
    assert seen["changed"]["mlp_only_layers"][1] == config_of(sound)["mlp_only_layers"]
    assert seen["refused"] is None
    engines = {engine["engine"]: engine for engine in seen["engines"]}
    assert engines["transformers"]["loads"] and engines["vLLM"]["loads"] and engines["llama.cpp (GGUF)"]["loads"]
    assert engines["nemotron-nas block_configs"]["loads"] is False
    assert "qwen2_moe" in engines["nemotron-nas block_configs"]["because"]
    refused = doctor(base, plan="0,1a,2-3").to_dict()["plan"]
    assert refused["refused"].startswith("W201")
    assert [engine["loads"] for engine in refused["engines"]] == [False] * 4
    with pytest.raises(PlanError, match="P103"):
        doctor(base, plan="0-9")
    assert doctor(folders("bloom")[0]).to_dict()["engines"][3]["because"].startswith("N104")
    unknown = doctor(folders("gpt_neo")[0]).to_dict()["engines"][1]
    assert unknown["loads"] is None and "GPTNeoForCausalLM" in unknown["because"]


def shoal(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(words), prog_name="shoal")
    assert result.exit_code == code, f"{result.output}{result.exception!r}"
    return result.stderr if code else result.stdout


def test_dry_runs_say_the_same(folders: Any, tmp_path: Path) -> None:
    base = str(folders("qwen2_moe")[0])
    wanted = json.loads(shoal("doctor", base, "--plan", "0,2-3", "--json"))["plan"]
    words = ("--plan", "0,2-3", "--dry-run", "--json")
    assert json.loads(shoal("write", base, *words, "--output", str(tmp_path / "out")))["outlook"] == wanted
    assert json.loads(shoal("prune", base, *words))["outlook"] == wanted
    said = shoal("prune", base, *words[:-1])
    assert "mlp_only_layers" in said and "vLLM" in said
    assert "W201" in shoal("write", base, "--plan", "0,1a", "--dry-run", "--output", str(tmp_path / "out"), code=1)


class Hub(BaseHTTPRequestHandler):
    """The few answers of a hub that the doctor needs, from a folder; remembers what was asked for."""

    folder: Path
    asked: list[str] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        name = self.path.rpartition("/")[2].partition("?")[0]
        ranged = self.headers.get("Range")
        if body:
            type(self).asked.append(f"{name} {ranged}" if ranged else name)
        file = self.folder / name
        if "/resolve/" not in self.path or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound")
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        if ranged:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", ranged).groups()  # type: ignore[union-attr]
            data = data[int(first) : int(last) + 1]
        self.send_response(206 if ranged else 200)
        for key, value in (("X-Repo-Commit", "a" * 40), ("ETag", f'"{name}"'), ("Content-Length", str(len(data)))):
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    Hub.asked = []
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_hub_id_fetches_its_papers_alone(folders: Any, hub: type[Hub], tmp_path: Path) -> None:
    base, sound = folders("llama")
    hub.folder = sound
    seen = doctor("owner/shards", plan="0,2")
    assert seen.diagnosis.findings == ()
    assert seen.spec.params == inspect_source(sound).params
    assert set(hub.asked) == {"config.json", INDEX}
    hub.asked.clear()
    shutil.copytree(sound, tmp_path / "single")
    numbered(tmp_path / "single")
    hub.folder = tmp_path / "single"
    seen = doctor("owner/single")
    assert [finding.what for finding in seen.diagnosis.findings] == ["the numbers of the layers"]
    assert {name.partition(" ")[0] for name in hub.asked} == {"config.json", "model.safetensors"}
    assert all(" bytes=" in name for name in hub.asked if name.startswith("model.safetensors"))
    with pytest.raises(ModelError, match="M317"):
        repair("owner/single", tmp_path / "out")
    hub.folder = tmp_path
    with pytest.raises(ModelError, match="M302"):
        doctor("owner/nothing")
    assert base.exists()


def test_an_offline_hub_id_is_one_sentence() -> None:
    assert "M307" in shoal("doctor", "nobody/nothing", code=1)
