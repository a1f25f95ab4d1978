"""Models with several stacks through the command line: written, pruned, shown, verified, and pruned again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from shoal.registry import entries

from ..documented.place import proving_here
from .kinds import STACKS, kind
from .test_stacks_write import word_tokenizer
from .verbs import CODED, run

STACKS_OF_TWO = [name for name, stacks in STACKS.items() if len(stacks) > 1]
SEVERAL = [pytest.param(name, marks=[] if name == "t5" else pytest.mark.slow) for name in STACKS_OF_TWO]
FIRST, SECOND = "0,3-5", "0,5"
"""Of six layers."""


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with proving_here():
        yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def shoal(*words: str, code: int = 0) -> str:
    """What a verb prints, or its refusal."""
    result = run(list(words))
    assert result.exit_code == code, f"{result.output} {result.exception!r}"
    return str(result.stderr if code else result.stdout)


def data(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shoal(*words, "--json"))
    return found


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    name = request.param
    kind(name).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    return str(tmp_path / name)


@pytest.mark.parametrize("base", SEVERAL, indirect=True)
def test_a_plan_of_all_stacks_is_written_with_its_page(base: str, tmp_path: Path) -> None:
    one, other = STACKS[Path(base).name]
    plan, out = f"{one}: {FIRST}; {other}: {SECOND}", str(tmp_path / "out")
    said = data("write", base, "--plan", plan, "--output", out)
    assert said["plan"] == plan and said["proof"]["passed"] is True
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for stack, text, runs in ((one, FIRST, 4), (other, SECOND, 2)):
        assert f"<title>{stack}: base layers 0 to 5, plan {text}</title>" in page
        assert f"Depth, {stack} layer runs" in page and f"{runs} of 6 {stack} layers run." in page
    assert "6 layers shallower" in page and plan in page
    records = [json.loads(line) for line in (tmp_path / "out" / "shoal" / "records.jsonl").read_text().splitlines()]
    assert records[-1]["numbers"]["plan"] == plan
    assert data("show", out)["dropped"] == {one: [1, 2], other: [1, 2, 3, 4]}
    assert data("verify", out)["passed"] is True


@pytest.mark.slow
@pytest.mark.parametrize("base", STACKS_OF_TWO, indirect=True)
def test_the_other_verbs_take_the_written_folder(base: str, tmp_path: Path) -> None:
    one, other = STACKS[Path(base).name]
    plan, out, again = f"{one}: {FIRST}; {other}: {SECOND}", str(tmp_path / "out"), str(tmp_path / "again")
    shoal("write", base, "--plan", plan, "--output", out)
    assert data("show", out, "--model", base)["dropped"] == {one: [1, 2], other: [1, 2, 3, 4]}
    assert json.loads(shoal("diff", out, out, "--json")) == []
    assert plan in shoal("convert", out, "--to", "notation")
    assert "sound" in shoal("doctor", out)
    shoal("write", "--config", str(tmp_path / "out" / "shoal" / "config.yaml"), base, "--output", again)
    assert data("show", again)["plan"] == plan


@pytest.mark.parametrize("base", ["clip", pytest.param("t5", marks=pytest.mark.slow)], indirect=True)
def test_pruned_twice_the_first_numbers_stay(base: str, tmp_path: Path) -> None:
    one, other = STACKS[Path(base).name]
    out, again, kept = str(tmp_path / "out"), str(tmp_path / "again"), str(tmp_path / "plan")
    shoal("write", base, "--plan", f"{one}: {FIRST}; {other}: 0-1,4-5", "--output", out)
    words = ["prune", out, "-m", "position", "-o", "which=first", "--stack", other, "--drop", "1"]
    said = data(*words, "--save-plan", kept, "--output", again)
    assert said["plan"] == f"{one}: 0-3; {other}: 1-3" and said["proof"]["passed"] is True
    assert "no layer removed" not in (tmp_path / "again" / "report.html").read_text(encoding="utf-8")
    for verb in ("inspect", "show"):
        lineage = data(verb, again)["lineage"]
        assert lineage["layers"] == {one: [0, 3, 4, 5], other: [1, 4, 5]}
        assert lineage["plan"] == f"{one}: {FIRST}; {other}: 1,4-5" and len(lineage["chain"]) == 2
    text = shoal("show", again)
    assert f"{one}: {FIRST}; {other}: 1,4-5" in text and "pruned 2 times" in text
    assert json.loads(shoal("diff", kept, again, "--json")) == []
    assert data("show", kept, "--model", out)["problems"] == []


@pytest.mark.parametrize("base", SEVERAL, indirect=True)
def test_each_stack_loses_layers_by_position(base: str) -> None:
    for stack in STACKS[Path(base).name]:
        said = data("prune", base, "-m", "position", "--stack", stack, "--drop", "2")
        assert {name: len(gone) for name, gone in said["dropped"].items() if gone} == {stack: 2}


@pytest.mark.parametrize("base", ["t5"], indirect=True)
def test_what_one_stack_alone_can_say_is_refused(base: str, tmp_path: Path) -> None:
    plan = f"encoder: {FIRST}; decoder: {SECOND}"
    out = str(tmp_path / "out")
    assert "N104" in shoal("convert", plan, "--model", base, "--to", "mergekit", code=1)
    assert "W240" in shoal("write", base, "--plan", plan, "--output", out, "--stream", code=1)
    assert "W2" in shoal("write", base, "--plan", plan, "--output", f"{out}.gguf", code=1)
    assert "W241" in shoal("write", base, "--plan", "encoder: 0-1", "--output", out, code=1)
    assert "P102" in shoal("write", base, "--plan", "vision: 0", "--output", out, code=1)
    dry = shoal("write", base, "--plan", plan, "--output", out, "--dry-run")
    assert "encoder: █··███" in dry and "decoder: █····█" in dry and "num_decoder_layers: 6 -> 2" in dry
    assert [place.name for place in tmp_path.iterdir()] == ["t5"]


@pytest.mark.parametrize("base", ["t5"], indirect=True)
def test_a_stand_in_is_fitted_in_the_stack_that_the_plan_changes(base: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog " * 20, encoding="utf-8")
    fuse = ["fuse", base, "--with", "linear-map", "--data", str(text), "--length", "16", "--limit", "4", "--plan"]
    assert data(*fuse, "encoder: 0,3-5")["plan"] == "encoder: 0,~1-2,3-5; decoder: 0-5"
    both = "encoder: 0,3-5; decoder: 0,3-5"
    assert "U653" in (said := shoal(*fuse, both, code=1)) and "--stack" in said
    fused = data(*fuse, both, "--stack", "decoder", "--save-plan", str(tmp_path / "plan"))
    assert fused["plan"] == "encoder: 0,3-5; decoder: 0,~1-2,3-5"
    assert "U654" in shoal(*fuse, str(tmp_path / "plan"), "--stack", "encoder", code=1)
    assert "M322" in shoal(*fuse, "encoder: 0,3-5", "--assess", code=1)
    assert "P102" in shoal(*fuse, "encoder: 0,3-5", "--stack", "vision", code=1)


ENTRIES = [
    (verb, name)
    for verb, kind_of in (("measure", "measures"), ("prune", "methods"), ("fuse", "transforms"))
    for name in entries(kind_of)
]


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "name"), ENTRIES)
@pytest.mark.parametrize("base", ["t5"], indirect=True)
def test_every_entry_works_in_every_stack_or_is_refused(base: str, verb: str, name: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog " * 20, encoding="utf-8")
    for stack in STACKS[Path(base).name]:
        words = {
            "measure": ["measure", base, "-m", name],
            "prune": ["prune", base, "-m", name, "--drop", "2", "--output", str(tmp_path / stack)],
            "fuse": ["fuse", base, "--with", name, "--plan", f"{stack}: 0,3-5"],
        }[verb]
        result = run([*words, "--stack", stack, "--data", str(text), "--length", "16", "--limit", "4"])
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        assert not result.exit_code or CODED.match(result.stderr.strip().splitlines()[-1]), result.stderr
