"""Which original layers a checkpoint holds, pruned again and again in different ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.models.load import inspect_source, load
from shoal.plan import Plan, parse_plan
from shoal.plan.lineage import KEY, Lineage, lineage_of_folder, read_lineage
from shoal.writing.folder import write
from shoal.writing.lineage import lineage_of, original_layers, record_lines
from shoal.writing.stream import stream

from .families import tiny
from .test_cli import shoal

BASE = {"family": "llama", "fingerprint": "f", "layers": {"decoder": 4}, "source": "base"}
NOTE = {"base_layers": [0, 2, 3], "plan": "0,2-3", "chain": ["0,2-3"], "base": BASE}


def made(source: Path, text: str, output: Path, how: str, **options: Any) -> Path:
    """`source` under the plan `text`, through memory or from file to file."""
    plan = parse_plan(text, Plan.identity(inspect_source(source)))
    if how == "stream":
        return stream(source, plan, output, **options).folder
    return write(load(source, device="cpu"), plan, output, prove=False, **options).folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base -> 0,2-3 by a write -> 2,0 by a stream -> 0x2,1 by a write: in the numbers of the base 3, 3, 0."""
    place = tmp_path_factory.mktemp("lineage")
    tiny("llama").save_pretrained(place / "base")
    made(place / "base", "0,2-3", place / "one", "write", records=[{"what": "first"}])
    made(place / "one", "2,0", place / "two", "stream", records=[{"what": "second"}])
    made(place / "two", "0x2,1", place / "three", "write", records=[{"what": "third"}])
    return place


def test_the_numbers_are_those_of_the_first_base(pruned: Path) -> None:
    expected = {"one": (0, 2, 3), "two": (3, 0), "three": (3, 3, 0)}
    base = tiny("llama").state_dict()
    for name, layers in expected.items():
        assert original_layers(AutoConfig.from_pretrained(pruned / name)) == layers
        tensors = AutoModelForCausalLM.from_pretrained(pruned / name).state_dict()
        for slot, layer in enumerate(layers):
            rest = "self_attn.q_proj.weight"
            assert torch.equal(tensors[f"model.layers.{slot}.{rest}"], base[f"model.layers.{layer}.{rest}"])
    found = lineage_of(AutoConfig.from_pretrained(pruned / "three"))
    assert found == lineage_of_folder(pruned / "three")
    assert found is not None
    assert found.chain == ("0,2-3", "2,0", "0x2,1")
    assert found.notation == "3x2,0"
    assert found.base["source"] == "base" and found.base["layers"] == {"decoder": 4}


def test_records_are_handed_on(pruned: Path) -> None:
    for name, expected in (("two", ["first", "second"]), ("three", ["first", "second", "third"])):
        lines = (pruned / name / "shoal" / "records.jsonl").read_text().splitlines()
        assert [json.loads(line)["what"] for line in lines] == expected


def test_the_card_says_the_chain(pruned: Path) -> None:
    said = (pruned / "three" / "README.md").read_text()
    assert "in the numbers of its own base, the layers are 3, 3, 0." in said
    assert "Pruned 3 times, each plan in the numbers of the model before it: `0,2-3`, then `2,0`, then `0x2,1`." in said
    assert "Pruned" not in (pruned / "one" / "README.md").read_text()


@pytest.mark.parametrize("verb", ["inspect", "show"])
def test_inspect_and_show_name_the_original_layers(pruned: Path, verb: str) -> None:
    said = shoal(verb, str(pruned / "three"))
    assert "original layers of 'base' (4 layers): 3x2,0" in said
    assert "pruned 3 times, each in the numbers before it: 0,2-3 then 2,0 then 0x2,1" in said
    data = json.loads(shoal(verb, str(pruned / "three"), "--json"))["lineage"]
    assert data == {"layers": [3, 3, 0], "plan": "3x2,0", "chain": ["0,2-3", "2,0", "0x2,1"]} | {"base": data["base"]}
    assert "pruned" not in shoal(verb, str(pruned / "one"))


def test_a_base_that_shoal_did_not_write_has_no_lineage(pruned: Path) -> None:
    assert "lineage" not in json.loads(shoal("inspect", str(pruned / "base"), "--json"))
    assert lineage_of_folder(pruned / "base") is None
    assert lineage_of_folder(pruned / "one" / "shoal" / "plan.json") is None
    assert lineage_of(AutoConfig.from_pretrained(pruned / "base")) is None


def test_the_depth_of_a_decoder_with_an_encoder_is_its_own() -> None:
    config = AutoConfig.for_model("bart", encoder_layers=12, decoder_layers=3, is_encoder_decoder=False)
    setattr(config, KEY, NOTE)
    assert original_layers(config) == (0, 2, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"base_layers": [0, 2]},
        {"base_layers": [0, 2, True]},
        {"base_layers": [0, 2, -1]},
        {"base": 3},
        {"silent": [[0]]},
        {"silent": [[0, "head"]]},
        {"silent": 3},
        {"mlps": [[0]]},
        {"mlps": [[0, -1]]},
        {"mlps": {"0": 1}},
    ],
)
def test_a_note_that_does_not_fit_is_ignored(change: dict[str, Any]) -> None:
    assert read_lineage(NOTE, 3) == Lineage((0, 2, 3), BASE, ("0,2-3",))
    assert read_lineage(NOTE | change, 3) is None


def test_a_damaged_chain_becomes_one_pruning_or_none() -> None:
    for chain in (None, ["`x`"], [3], "0-1", ["0-1", "<b>"]):
        assert read_lineage(NOTE | {"chain": chain}, 3) == Lineage((0, 2, 3), BASE, ("0,2-3",))
    found = read_lineage(NOTE | {"chain": [], "plan": "| rm -r"}, 3)
    assert found is not None and found.chain == () and found.notation == "0,2-3"


def test_mlps_of_other_layers_are_composed() -> None:
    first = Lineage((5, 6, 7), BASE).then((0, 2), [], "0,2a,1m", {1: 1})
    assert first.notation == "5,7a,6m" and first.mlps == {1: 6}
    second = first.then((1, 1, 0), [(2, "mlp")], "1,1a,0m,0a", {1: 0})
    assert second.notation == "7a,6m,7a,5m,5a" and second.mlps == {0: 6, 1: 5}
    assert second.then((0, 1), [], "0a,1m,1a,0m", {0: 1, 1: 0}).notation == "7a,5m,7a,6m"
    quiet = Lineage((5, 6), BASE, silent=frozenset({(0, "mlp"), (1, "attention")}))
    assert quiet.then((0, 1), [], "0a,1m,1a,0m", {0: 1, 1: 0}).notation == "5a,6m"
    assert read_lineage(second.to_note("1"), 3) == second


def test_silent_parts_are_composed() -> None:
    first = Lineage((0, 2, 3), BASE, ("0,2a,3",), frozenset({(1, "mlp")}))
    second = first.then((1, 0, 1), [(2, "attention")], "1,0,1m")
    assert second.layers == (2, 0, 2) and second.silent == {(0, "mlp"), (2, "mlp"), (2, "attention")}
    assert second.notation == "2a,0", "a run with neither part does nothing"
    assert read_lineage(second.to_note("1"), 3) == second


def test_records_of_strangers_are_read_with_care(tmp_path: Path) -> None:
    file = tmp_path / "base" / "shoal" / "records.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(b'{"a": 1}\nno json\n[1]\n\xff\n' + b"[" * 10_000 + b'\n{"b": 2}\n')
    assert record_lines(tmp_path / "base", [{"é": 3}]) == ['{"a": 1}', '{"b": 2}', '{"é": 3}']
    assert record_lines(None, []) == []
    link = tmp_path / "other" / "shoal" / "records.jsonl"
    link.parent.mkdir(parents=True)
    link.symlink_to(file)
    assert record_lines(tmp_path / "other", []) == []
