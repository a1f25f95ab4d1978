"""shoal convert on a tiny model in a folder: there and back, as a file and as JSON, each mistake one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from shoal.plan import load_plan

from .test_api import folder  # noqa: F401
from .test_cli import shoal


@pytest.fixture(scope="module")
def model(folder: Path) -> str:  # noqa: F811
    return str(folder)


def test_a_plan_goes_to_mergekit_and_comes_back(model: str, tmp_path: Path) -> None:
    recipe = tmp_path / "slices.yaml"
    said = shoal("convert", "0-1,3-4,3-4", "--model", model, "--to", "mergekit", "--output", str(recipe))
    assert said == f"written to {recipe}: 0-1,3-4,3-4\n"
    sources = [piece["sources"][0] for piece in yaml.safe_load(recipe.read_text())["slices"]]
    assert sources == [{"model": model, "layer_range": r} for r in ([0, 2], [3, 5], [3, 5])]
    back = shoal("convert", str(recipe), "--from", "mergekit", "--to", "notation", "--model", model)
    assert back == "0-1,3-4,3-4\n"


def test_a_plan_file_needs_no_model(model: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    shoal("convert", "[2]", "--from", "shortgpt", "--to", "plan-json", "--model", model, "--output", str(plan))
    assert str(load_plan(plan)) == "0-1,3-4"
    assert shoal("convert", str(plan), "--to", "llama-quantize") == "2\n"
    said = json.loads(shoal("convert", str(plan), "--to", "pruneme", "--json"))
    assert said["text"] == "[3]\n"
    assert (said["plan"], said["hash"], said["output"]) == ("0-1,3-4", load_plan(plan).hash, None)
    assert f"model: {model}" in shoal("convert", str(plan), "--to", "mergekit")


def test_what_came_in_is_checked_for_the_model(model: str) -> None:
    none_left = ["convert", '{"attention": [0,1,2,3,4]}', "--from", "swift", "--to", "notation", "--model", model]
    assert "P106" in shoal(*none_left, code=1)
    assert "P103" in shoal("convert", "0-9", "--to", "shortgpt", "--model", model, code=1)


def test_mistakes_are_one_sentence(model: str, tmp_path: Path) -> None:
    typed = ("--model", model)
    assert "N104: shortgpt cannot say 2a" in shoal("convert", "0-1,2a,3-4", "--to", "shortgpt", *typed, code=1)
    assert "N104: nemotron-nas" in shoal("convert", "0-3", "--to", "nemotron-nas", *typed, code=1)
    assert "did you mean mergekit?" in shoal("convert", "0-3", "--to", "mergkit", *typed, code=1)
    assert "U523" in shoal("convert", "[1]", "--from", "shortgpt", "--to", "notation", code=1)
    missing = ("convert", "slices.yml", "--from", "mergekit", "--to", "notation", *typed)
    assert "U541: there is no file 'slices.yml'" in shoal(*missing, code=1)
    assert "W215" in shoal("convert", "0-3", "--to", "shortgpt", *typed, "--output", str(tmp_path), code=1)
    nowhere = tmp_path / "none" / "plan.json"
    assert "W215" in shoal("convert", "0-3", "--to", "shortgpt", *typed, "--output", str(nowhere), code=1)
    assert list(tmp_path.iterdir()) == []


def test_the_formats_are_listed() -> None:
    found = json.loads(shoal("ls", "exchange", "--json"))["exchange"]
    assert {"mergekit", "llm-drop", "swift", "nemotron-nas", "llama-quantize"} <= {entry["name"] for entry in found}
