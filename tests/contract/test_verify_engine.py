"""shoal verify --engine: what is compared, and what is said of an engine that is not there, refuses or is wrong.

A small program stands for the Python that has vLLM; `make test-vllm` runs the real one.
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import ShoalError
from shoal.models.load import load
from shoal.writing import engine
from shoal.writing.engine import verify_engine
from shoal.writing.planned_folder import write_planned

from .families import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("engine") / "m"
    write_planned(tiny("llama", "eager"), "0,1a,2,2,3m", place, prove=False)
    return place


@pytest.fixture(scope="module")
def right(folder: Path) -> dict[str, Any]:
    """What an engine without fault answers."""
    model = load(folder, dtype="float32").model
    return answer_of(model) | {"parameters": _parameters(folder), "rows": 4}


def answer_of(model: Any) -> dict[str, Any]:
    tokens, scores = engine._written(model, engine._prompts(model))
    likeliest = [[{str(int(t)): float(row[t]) for t in row.topk(5).indices} for row in one] for one in scores]
    return {"tokens": tokens, "scores": likeliest}


def _parameters(folder: Path) -> int:
    model = tiny("llama", "eager")
    return write_planned(model, "0,1a,2,2,3m", folder.parent / "again", prove=False, overwrite=True).params


def python(tmp_path: Path, *answers: dict[str, Any] | None) -> str:
    """A program that gives the answers, one for each time that it is asked; it fails where there is none."""
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys\njson.load(sys.stdin)\n"
        f"place = pathlib.Path({str(tmp_path / 'answers.json')!r})\n"
        "first, *others = json.loads(place.read_text())\nplace.write_text(json.dumps(others))\n"
        "if first is None:\n    sys.exit('No module named shoal_vllm')\n"
        "print('a line of some library')\nprint(json.dumps([first]))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def changed(right: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return json.loads(json.dumps(right)) | fields


def other_token(right: dict[str, Any]) -> dict[str, Any]:
    found = changed(right)
    found["tokens"][1][3] += 1
    return found


def test_an_engine_without_fault_passes(folder: Path, right: dict[str, Any], tmp_path: Path) -> None:
    proof = verify_engine(folder, python=python(tmp_path, right))
    assert proof.passed and [check.name for check in proof.checks] == ["tokens", "scores", "parameters", "rows"]
    assert proof.checks[0].value == "3 of 3" and proof.checks[1].value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("field", ["parameters", "rows"])
def test_other_counts_fail(folder: Path, right: dict[str, Any], field: str, tmp_path: Path) -> None:
    proof = verify_engine(folder, python=python(tmp_path, changed(right, **{field: right[field] + 1})))
    assert [check.name for check in proof.failures] == [field]


def test_other_scores_fail(folder: Path, right: dict[str, Any], tmp_path: Path) -> None:
    other = changed(right)
    other["scores"][0][5] = {token: score - 0.01 for token, score in other["scores"][0][5].items()}
    proof = verify_engine(folder, python=python(tmp_path, other, small_right()))
    assert [check.name for check in proof.failures] == ["scores"]


def small_right() -> dict[str, Any]:
    """What an engine without fault answers of the small model without a plan."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(engine._small(tiny("llama", "eager").config), dtype=torch.float32).eval()
    engine._spread(plain)
    return answer_of(plain)


def test_a_family_that_is_wrong_without_a_plan_is_refused_by_name(
    folder: Path, right: dict[str, Any], tmp_path: Path
) -> None:
    wrong = other_token(right)
    assert not verify_engine(folder, python=python(tmp_path, wrong, small_right())).passed
    for second in (other_token(small_right()), {"error": "no kernel"}):
        with pytest.raises(ShoalError, match="LlamaForCausalLM wrong without any plan") as caught:
            verify_engine(folder, python=python(tmp_path, wrong, second))
        assert caught.value.code == "W309"


def test_what_cannot_be_asked_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    for how, code in (
        ({"python": str(tmp_path / "none")}, "U730"),
        ({"python": python(tmp_path, None)}, "U731"),
        ({"engine": "tgi"}, "U732"),
    ):
        with pytest.raises(ShoalError) as caught:
            verify_engine(folder, **how)  # type: ignore[arg-type]
        assert caught.value.code == code and "\n" not in str(caught.value)
    with pytest.raises(ShoalError, match=r"vllm does not run .*: layers run in parallel"):
        verify_engine(folder, python=python(tmp_path, {"error": "layers run in parallel"}))


def test_options_that_do_not_go_together(folder: Path, right: dict[str, Any], tmp_path: Path) -> None:
    run = CliRunner().invoke
    for words, code in ((["--engine-python", "p"], "U734"), (["--engine", "vllm", "--dtype", "float32"], "U735")):
        refused = run(app, ["verify", str(folder), *words])
        assert refused.exit_code == 1 and f"{code}: " in refused.output
    done = run(app, ["verify", str(folder), "--engine", "vllm", "--engine-python", python(tmp_path, right), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["passed"]
