"""A folder's generation config: what transformers cannot generate by is named, and what it can is heeded everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import shoal
from gguf_files import tiny_model, tiny_tokenizer
from shoal.api.drafted import generate_drafted
from shoal.decoding.arguments import GREEDY_ALONE, timed
from shoal.decoding.blame import naming_the_config
from shoal.decoding.decoder import Decoder
from shoal.errors import ModelError
from shoal.models.load import load
from shoal.speculating.speculator import Speculator

from .shares import pairs
from .test_cli import shoal as command

BAD: list[dict[str, Any]] = [
    {"eos_token_id": "x"},
    {"bos_token_id": "x"},
    {"eos_token_id": ["1"]},
    {"suppress_tokens": ["x"]},
    {"bad_words_ids": "x"},
    {"sequence_bias": 3},
    {"repetition_penalty": -1},
    {"no_repeat_ngram_size": "x"},
    {"guidance_scale": "x"},
    {"exponential_decay_length_penalty": 3},
    {"min_length": "x"},
    {"stop_strings": 3},
    {"constraints": 3},
]
WAYS = {
    "generate": ("generate", "{}", "ab", "--raw", "-q", "--max-new-tokens", "3"),
    "policy": (
        "generate",
        "{}",
        "ab",
        "--raw",
        "-q",
        "--max-new-tokens",
        "3",
        "--policy",
        "exit:confidence=1,layers=2",
    ),
    "plan": ("generate", "{}", "ab", "--raw", "-q", "--max-new-tokens", "3", "--plan", "0,2-5"),
    "speculate": ("generate", "{}", "ab", "--raw", "-q", "--max-new-tokens", "3", "--speculate", "exit:2"),
    "evaluate": ("evaluate", "{}", "-q", "--window", "16", "--limit", "2", "--new-tokens", "3"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation") / "base"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def with_settings(base: Path, **settings: Any) -> Path:
    path = base / "generation_config.json"
    own = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: own.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    path.write_text(json.dumps({**kept, **settings}), encoding="utf-8")
    return base


@pytest.fixture
def folder(base: Path) -> Any:
    path = base / "generation_config.json"
    before = path.read_text(encoding="utf-8")
    yield base
    path.write_text(before, encoding="utf-8")


@pytest.mark.parametrize(("settings", "way"), pairs(5, BAD, WAYS))
def test_what_cannot_be_generated_by_is_named(settings: dict[str, Any], way: str, folder: Path) -> None:
    with_settings(folder, **settings)
    words = [word.format(folder) for word in WAYS[way]]
    name, value = next(iter(settings.items()))
    if way == "evaluate" and (name in GREEDY_ALONE or value == ["1"]):
        command(*words)  # its text is greedy, whatever the config says
    else:
        said = command(*words, code=1)
        asked = f"M379: transformers cannot generate by {name}={value!r} of this model's generation config"
        assert asked in said or (way == "speculate" and "U615: " in said)


@pytest.mark.parametrize(
    "settings", [{"num_beams": 4}, {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}]
)
@pytest.mark.parametrize("way", WAYS)
def test_beams_of_a_config_are_left_aside(way: str, settings: dict[str, Any], folder: Path) -> None:
    words = [word.format(folder) for word in WAYS[way]]
    plain = json.loads(command(*words, "--json"))
    with_settings(folder, **settings)
    assert json.loads(command(*words, "--json")).get("text") == plain.get("text")


@pytest.mark.parametrize("draft", [None, "exit:2"])
def test_strings_of_a_config_end_the_text(draft: str | None, folder: Path) -> None:
    loaded = load(folder)
    text = shoal.generate(loaded, "ab", chat=False, max_new_tokens=12).text
    stop = text[2:4]
    loaded.model.generation_config.stop_strings = [stop]
    if draft is None:
        found = shoal.generate(loaded, "ab", chat=False, max_new_tokens=12).text
    else:
        found = generate_drafted(loaded, "ab", draft=draft, chat=False, max_new_tokens=12).text
    assert len(found) < len(text)
    assert stop in found


def test_timing_needs_no_tokenizer_for_strings_of_a_config(folder: Path) -> None:
    with_settings(folder, stop_strings=["ab"])
    words = ("-q", "--json", "--policy", "exit:confidence=1,layers=2", "--prompt", "4", "--new", "3", "--pairs", "1")
    assert json.loads(command("bench", str(folder), *words))["looks"] >= 0
    loaded = load(folder)
    ids = loaded.tokenizer("ab", return_tensors="pt")["input_ids"]
    wanted = Decoder(loaded.model).generate(ids, **timed(3))
    assert wanted.shape[1] == ids.shape[1] + 3
    assert torch.equal(Speculator(loaded.model, "exit:2").generate(ids, **timed(3)), wanted)


def test_an_error_that_the_config_did_not_bring_stays_what_it_is(folder: Path) -> None:
    model = load(with_settings(folder, repetition_penalty=1.3)).model
    with pytest.raises(ValueError, match="mine"), naming_the_config(model):
        raise ValueError("mine")
    model.generation_config.sequence_bias = 3
    with pytest.raises(ModelError, match="by sequence_bias=3 of"), naming_the_config(model):
        raise ValueError("mine")
    assert model.generation_config.sequence_bias == 3
