"""What the doctor says of a plan, in dry runs too, and of a hub id, of which it fetches the metadata alone."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub.constants
import pytest

from shoal.api.doctor import doctor
from shoal.errors import ModelError, PlanError
from shoal.models.load import inspect_source
from shoal.models.shards import INDEX
from shoal.writing.repair import repair

from .broken import config_of, folders, numbered, shoal

__all__ = ["folders"]


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
    asked: ClassVar[list[str]] = []

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
    assert [finding.what for finding in seen.diagnosis.findings] == ["the numbering of the layers"]
    assert {name.partition(" ")[0] for name in hub.asked} == {"config.json", "model.safetensors"}
    assert all(" bytes=" in name for name in hub.asked if name.startswith("model.safetensors"))
    with pytest.raises(ModelError, match="M317"):
        repair("owner/single", tmp_path / "out")
    hub.folder = tmp_path
    with pytest.raises(ModelError, match="M302"):
        doctor("owner/nothing")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"M370.* of owner/base"):
        doctor("owner/adapter")
    assert base.exists()


@pytest.mark.parametrize("verb", [("inspect",), ("measure",), ("write", "--plan", "0", "--output", "OUT")])
def test_a_hub_id_is_compared_before_its_weights_are_fetched(
    verb: tuple[str, ...], folders: Any, hub: type[Hub], tmp_path: Path
) -> None:
    _, sound = folders("llama")
    hub.folder = tmp_path / "single"
    shutil.copytree(sound, hub.folder)
    numbered(hub.folder)
    words = [word.replace("OUT", str(tmp_path / "out")) for word in verb[1:]]
    assert "M313" in shoal(verb[0], "owner/single", *words, code=1)
    assert "model.safetensors" not in hub.asked, "whole"


def test_an_offline_hub_id_is_one_sentence() -> None:
    assert "M307" in shoal("doctor", "nobody/nothing", code=1)
