"""A model whose code comes with it: every verb asks for --trust-remote-code, and hands it on to every layer below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gguf_files import tiny_model, tiny_tokenizer
from shoal.cli import app

from .shares import every

TRUST = "--trust-remote-code"
CONFIG = """from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODEL = """from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig
from .own_helper import ANSWER


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    answer = ANSWER
"""
VERBS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "IN"),
    "measure": ("measure", "IN", "--length", "16", "--limit", "1"),
    "evaluate": ("evaluate", "IN", "--window", "16", "--limit", "1", "--no-generation"),
    "generate": ("generate", "IN", "hello", "--max-new-tokens", "2"),
    "prune": ("prune", "IN", "--drop", "1", "--method", "position", "--no-assess", "--output", "OUT"),
    "write --dry-run": ("write", "IN", "--plan", "0-3", "--output", "OUT", "--dry-run"),
    "show": ("show", "0-3", "--model", "IN"),
    "convert": ("convert", "0-3", "--to", "notation", "--model", "IN"),
    "doctor": ("doctor", "IN"),
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with code of its own in three files."""
    place = tmp_path_factory.mktemp("own") / "model"
    tiny_model("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    raw = json.loads((place / "config.json").read_text(encoding="utf-8")) | {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (place / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    files = {"configuration_own.py": CONFIG, "modeling_own.py": MODEL, "own_helper.py": "ANSWER = 42\n"}
    for name, text in files.items():
        (place / name).write_text(text, encoding="utf-8")
    return place


def typed(words: tuple[str, ...], place: Path, out: Path) -> Any:
    known = {"IN": str(place), "OUT": str(out)}
    return CliRunner().invoke(app, [known.get(word, word) for word in words], prog_name="shoal", input="")


def code_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.py"))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_asks_and_takes_the_option(verb: str, own: Path, tmp_path: Path) -> None:
    refused = typed(VERBS[verb], own, tmp_path / "out")
    assert refused.exit_code == 1, refused.output
    assert refused.stderr.startswith("shoal: M312: "), refused.stderr
    taken = typed((*VERBS[verb], TRUST), own, tmp_path / "out")
    assert taken.exit_code == 0, f"{taken.output} {taken.exception!r}"
    assert "Do you wish" not in taken.output + taken.stderr


@pytest.mark.parametrize("how", every(2, [(), ("--stream",)]))
def test_what_is_written_carries_its_code_and_proves_itself(how: tuple[str, ...], own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("write", "IN", "--plan", "0-2,4-5", "--output", "OUT", *how)
    assert typed(words, own, out).stderr.startswith("shoal: M312: ")
    written = typed((*words, TRUST), own, out)
    assert written.exit_code == 0, f"{written.output} {written.exception!r}"
    assert code_files(out) == ["configuration_own.py", "modeling_own.py", "own_helper.py"]
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"] == 5
    assert typed(("verify", "IN"), out, out).stderr.startswith("shoal: M312: ")
    verified = typed(("verify", "IN", TRUST), out, out)
    assert verified.exit_code == 0, f"{verified.output} {verified.exception!r}"


def test_code_that_needs_a_package_says_which(own: Path, tmp_path: Path) -> None:
    import shutil

    place = tmp_path / "needs"
    shutil.copytree(own, place)
    (place / "modeling_own.py").write_text(f"import a_package_that_nobody_has\n{MODEL}", encoding="utf-8")
    result = typed(("measure", "IN", TRUST), place, tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("shoal: M353: ")
    assert "a_package_that_nobody_has" in result.stderr
