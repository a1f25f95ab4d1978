"""Functions in Python files of the user's own: every example through the command line, each mistake as a sentence."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.api.compare import compare
from shoal.api.measuring import measure
from shoal.api.prune import prune
from shoal.api.study import Protocol, cells
from shoal.errors import UsageError
from shoal.models.load import Loaded
from shoal.registry import KINDS, entries, get
from shoal.user_files import adopt, known_files, read_user_file

from .families import tiny
from .planted import random_data
from .test_api import folder  # noqa: F401
from .test_cli import SMALL, shoal

EXAMPLES = Path(__file__).parents[2] / "examples"
EMPTY = "def mine(model, data, *, stack=None, batch=1, progress=None):\n    '''Nothing.'''\n"


@pytest.fixture
def model(folder: Path) -> str:  # noqa: F811
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def example(name: str) -> str:
    return str(EXAMPLES / f"{name}.py")


def said(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shoal(*words, "--json", "-q"))
    return found


def named(found: dict[str, Any], name: str) -> bool:
    """Whether a result names the file, with its hash."""
    return found["files"] == [{"path": example(name), "sha256": read_user_file(example(name)).sha256}]


def test_every_example_is_tested_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for file in EXAMPLES.glob("*.py"):
        assert re.search(rf"example\(.{file.stem}.\)", source), file
        assert 20 <= len(file.read_text(encoding="utf-8").splitlines()) <= 40


def test_a_measure(model: str) -> None:
    file = example("weight_share")
    found = said("measure", model, "--measure", file, "-o", "exponent=1", *SMALL)
    assert named(found, "weight_share") and found["detail"]["file"] == found["files"][0]
    assert found["order"][0] == 2 and sum(found["values"]) == pytest.approx(1), (
        "the silent layer has the fewest weights"
    )
    assert "no option 'exponnt' (did you mean exponent?)" in shoal(
        "measure", model, "-m", file, "-o", "exponnt=1", code=1
    )
    both = said("measure", model, "-m", file, "-m", "magnitude", *SMALL)
    assert len(both["scores"]) == 2 and named(both, "weight_share")


def test_a_method(model: str, tmp_path: Path) -> None:
    words = ["--method", example("thin_middle"), "--drop", "1", "-o", "keep_first=3", *SMALL, "--no-assess"]
    found = said("prune", model, *words, "--output", str(tmp_path / "out"))
    assert named(found, "thin_middle") and found["plan"] == "0-2,4", "the silent layer 2 is safe"
    (line,) = (tmp_path / "out" / "shoal" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["numbers"]["files"] == found["files"]
    assert found["files"][0]["sha256"] in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_policy(model: str) -> None:
    words = ["Once upon", "--max-new-tokens", "6", "--raw"]
    found = said("generate", model, *words, "--policy", f"{example('warm_up')}:tokens=12,every=2")
    assert named(found, "warm_up")
    depths = [row["layers"] for row in found["trace"]["written"]]
    assert set(depths) == {5.0, 3.0} and depths == sorted(depths, reverse=True)


def test_a_draft(model: str) -> None:
    words = ["Once upon", "--max-new-tokens", "8", "--raw"]
    found = said("generate", model, *words, "--speculate", f"lookup+{example('ends')}:first=1;last=2")
    assert named(found, "ends") and found["stats"]["drafted"]
    assert found["text"] == said("generate", model, *words)["text"]
    assert "U610" in shoal("generate", model, *words, "--speculate", f"{example('ends')}:9", code=1)


def test_a_transform_and_a_format(model: str, here: Path) -> None:
    (here / "halved.py").write_text(
        "from shoal.fitting.result import Job, Transformed\nfrom shoal.plan import parse_plan\n\n\n"
        "def halved(job: Job, *, layer: int = 0) -> Transformed:\n    '''Halve an mlp.'''\n"
        "    plan = parse_plan(f'{layer}:half,' + ','.join(map(str, job.plan.layers()[1:])), job.plan)\n"
        "    own = job.model.model.layers[layer].mlp.down_proj.weight\n"
        "    return Transformed(plan, {'half.mlp.down_proj.weight': own.detach() / 2})\n",
        encoding="utf-8",
    )
    (here / "count.py").write_text(
        "from shoal.exchange._format import Format\n\n\ndef count() -> Format:\n    '''The number of steps.'''\n"
        "    return Format(lambda text, plan: plan, lambda plan, spec: f'{len(plan.steps())}')\n",
        encoding="utf-8",
    )
    words = ["--plan", "0-1,3-4", *SMALL, "--no-assess", "--save-plan", "kept"]
    found = said("fuse", model, *words, "--with", "./halved.py:layer=0")
    assert found["plan"] == "0:half,1,3-4" and found["files"][0]["path"] == "./halved.py"
    assert shoal("convert", "0-1,3-4", "--model", model, "--to", "count.py").strip() == "4"


WRONG = {
    "no such file": (None, "U516", "cannot read the file './mine.py': No such file or directory"),
    "another function": ("def yours():\n    pass\n", "U517", "defines no function mine; it defines yours"),
    "no function": ("mine = 1\n", "U517", "defines no function mine; give the function the file's name"),
    "no Python": ("def mine(:\n    pass\n", "U518", "./mine.py line 1 is not Python: "),
    "no text": (b"\xff\xfe", "U518", "is not UTF-8 text"),
    "a zero byte": ("def mine():\n    '\x00'\n", "U518", "is not Python"),
    "raises": (f"import math\n\nmath.sqrt(-1)\n{EMPTY}", "U519", "ValueError in line 3: math domain error"),
    "no such package": (f"import no_such_package\n{EMPTY}", "U519", "ModuleNotFoundError in line 1"),
    "too few parameters": ("def mine(model):\n    pass\n", "U517", "which is called as mine(model, data, *, stack=..."),
    "too many parameters": (EMPTY.replace("data,", "data, more,"), "U517", "its parameter more would have no value"),
    "no harness": ("def mine(model, data):\n    pass\n", "U517", "unexpected keyword argument 'stack'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_cannot_be_used_is_one_sentence(model: str, here: Path, case: str) -> None:
    content, code, words = WRONG[case]
    if content is not None:
        (here / "mine.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = shoal("measure", model, "--measure", "./mine.py", code=1)
    assert code in message and words in message
    assert not [name for name in sys.modules if name.endswith("_mine") and case == "raises"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_taken_from_a_file_and_none_is_listed(here: Path, kind: Any) -> None:
    (here / "my-own.py").write_text("def my_own(*given, **more):\n    '''Mine. Of all kinds.'''\n", encoding="utf-8")
    entry = get(kind, "my-own.py")
    assert (entry.kind, entry.name, entry.attribute, entry.summary) == (kind, "my-own.py", "my_own", "Mine.")
    assert entry.load().__name__ == "my_own" and entry.options() == {}
    assert "my-own.py" not in entries(kind) and "my-own" not in entries(kind)
    with pytest.raises(UsageError, match="U501"):
        get(kind, "my-own")


def test_an_edited_file_is_read_anew(here: Path) -> None:
    loaded = Loaded(tiny("llama"), None, "tiny")
    for value in (1.0, 2.0):
        (here / "mine.py").write_text(
            "from shoal.scores import Scores, Traits\nTRAITS = Traits(text=False)\n"
            + EMPTY
            + f"    return Scores('mine', 'decoder', '1', ({value},) * 4, (None,) * 4, 0, 0, '')\n",
            encoding="utf-8",
        )
        found = measure(loaded, "mine.py")
        assert found.values == (value,) * 4
        assert found.detail["file"] == {"path": "mine.py", "sha256": read_user_file("mine.py").sha256}


METHOD = """from shoal.plan import drop as without
from shoal.scores import Candidate, Found
READS_DATA = False


def mine(task, *, drop: int, last: bool = False):
    '''Drop what is first, or last.'''
    layers = task.plan.layers()
    plan = without(task.plan, layers[-drop:] if last else layers[:drop])
    return Found(plan, (Candidate(str(plan), 0.0),))
"""
PROTOCOL = Protocol(length=16, limit=2, window=16, windows=2, new_tokens=0, pairs=0, compared=1)


def test_a_comparison_goes_by_the_text_of_a_file(folder: Path, here: Path) -> None:  # noqa: F811
    (here / "mine.py").write_text(METHOD, encoding="utf-8")
    asked: dict[str, Any] = {"methods": ("./mine.py", "./mine.py:last=true"), "budgets": ("layers=0.8",)}
    asked |= {"protocol": PROTOCOL, "device": "cpu"}
    first = compare(folder, here / "out", **asked)
    assert [row["result"]["plan"] for row in first.rows[1:]] == ["1-4", "0-3"]
    assert first.rows[1]["file"] == {"path": "./mine.py", "sha256": read_user_file("./mine.py").sha256}
    before = (here / "out" / "cells.jsonl").read_bytes()
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "mine.py").write_text(METHOD, encoding="utf-8")
    again = compare(folder, here / "out", **(asked | {"methods": ("elsewhere/mine.py",)}))
    assert again.rows[1] == first.rows[1] and (here / "out" / "cells.jsonl").read_bytes() == before
    (here / "mine.py").write_text(METHOD.replace("layers[:drop]", "layers[1 : drop + 1]"), encoding="utf-8")
    edited = compare(folder, here / "out", **asked)
    assert [row["result"]["plan"] for row in edited.rows[1:]] == ["0,2-4", "0-3"], "an edited file is another method"


def test_another_process_runs_the_text_that_it_is_sent(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "mine.py").write_text(METHOD, encoding="utf-8")
    (cell,) = cells(["mine.py:last=true"], ["layers=0.5"], [0])
    sent = [file for file in known_files() if file.name == "mine.py"]
    monkeypatch.setattr("shoal.user_files._sent", {})
    (here / "mine.py").unlink()
    with pytest.raises(UsageError, match="U516"):
        cell.settings()
    adopt(sent)
    assert cell.settings() == {"last": True}
    loaded, asked = Loaded(tiny("llama"), None, "tiny"), cell.settings()
    found = prune(loaded, method="mine.py", drop=1, settings=asked, data=random_data(2, 12), writable=False)
    assert str(found.plan) == "0-2" and found.files[0]["sha256"] == sent[0].sha256


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray; runs where it is installed")
def test_ray_workers_run_the_file(folder: Path, here: Path) -> None:  # noqa: F811
    (here / "mine.py").write_text(METHOD, encoding="utf-8")
    asked: dict[str, Any] = {"methods": ("./mine.py",), "budgets": ("layers=0.8",), "protocol": PROTOCOL}
    found = compare(folder, here / "out", device="cpu", ray="local", workers=1, **asked)
    assert found.rows[1]["result"]["plan"] == "1-4"
