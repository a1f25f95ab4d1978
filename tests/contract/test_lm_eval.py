"""Tasks of lm-eval on a live model: the same figures as our own scoring of the same items, and one sentence without."""

from __future__ import annotations

import importlib.util
import json
import pickle  # noqa: TID251 -- what Ray does with a task, on data that this file made
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.api import task_scores as task_scores_module
from shoal.api.assess import evaluate
from shoal.api.task_scores import load_task_sets, task_scores
from shoal.errors import DataError, UsageError
from shoal.evaluation import lm_eval as lm_eval_module
from shoal.live import running
from shoal.models.load import Loaded, load

from .shares import every
from .test_api import model_folder

ROWS = [{"context": f"the {word} and", "choices": ["a", "of the", "in to"], "gold": n % 3}
        for n, word in enumerate(["", "a", "of", "to", "in", "and", "is", "was"])]  # fmt: skip
there = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval; runs where it is installed"
)
noisy = pytest.mark.filterwarnings("ignore")  # lm-eval and what it imports


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(model_folder(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same items as a .jsonl file and as a task of lm-eval that reads it."""
    place = tmp_path_factory.mktemp("tasks")
    own, task = place / "own.jsonl", place / "theirs.yaml"
    own.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"data_files": str(own), "cache_dir": str(place / "cache")}
    metrics = [{"metric": "acc"}, {"metric": "acc_norm"}]
    facts = {"task": "theirs", "dataset_path": "json", "dataset_kwargs": data, "test_split": "train"}
    facts |= {"output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_target": "gold"}
    task.write_text(yaml.safe_dump(facts | {"doc_to_choice": "choices", "metric_list": metrics}))
    return own, task


@there
@noisy
@pytest.mark.parametrize("plan", ["0-4", "0,3-4"])
def test_the_same_items_score_the_same_here_and_by_lm_eval(
    loaded: Loaded, choices: tuple[Path, Path], plan: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = load_task_sets(choices, limit=6)
    with running(loaded.model, plan):
        own, theirs = task_scores(loaded.model, loaded.tokenizer, asked).values()
    assert theirs.name == "theirs" and theirs.items == own.items == 6
    assert theirs.correct == own.correct and theirs.normalised == pytest.approx(own.normalised)
    assert theirs.accuracy == own.accuracy and theirs.error == pytest.approx(own.error)
    assert capsys.readouterr() == ("", "")


@there
@noisy
def test_other_items_are_another_task_and_a_copy_is_the_same(choices: tuple[Path, Path]) -> None:
    six, eight = (load_task_sets(choices[1:], limit=n)[0] for n in (6, None))
    assert six.sha256 != eight.sha256
    assert pickle.loads(pickle.dumps(six)).sha256 == six.sha256  # noqa: S301


@there
@noisy
def test_evaluate_scores_the_plan_and_the_dense_model(loaded: Loaded, choices: tuple[Path, Path]) -> None:
    asked: dict[str, Any] = {"window": 16, "limit": 2, "generation": False}
    found = evaluate(loaded, plan="4", tasks=[choices[1]], **asked)
    alone = evaluate(loaded, tasks=[choices[0]], **asked)
    assert found.dense_tasks["theirs"].correct == alone.tasks["own"].correct
    assert found.to_dict()["tasks"]["theirs"]["items"] == len(ROWS)


@there
@noisy
@pytest.mark.parametrize("name", ["no-such-task", "broken.yaml", "far.yaml"])
def test_a_task_that_cannot_be_had_is_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("- no\n- task\n")
    Path("far.yaml").write_text("task: far\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.jsonl}\n")
    with pytest.raises(DataError, match=f"D452.*{name}"):
        load_task_sets([name])
    assert capsys.readouterr() == ("", "")


@there
@noisy
def test_a_task_without_right_and_wrong_is_refused_before_it_runs(choices: tuple[Path, Path], tmp_path: Path) -> None:
    facts = yaml.safe_load(choices[1].read_text())
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(facts | {"metric_list": [{"metric": "brier_score"}]}))
    with pytest.raises(DataError, match=r"D453.*brier_score"):
        load_task_sets([tmp_path / "other.yaml"])


def test_without_lm_eval_a_task_is_one_sentence_and_a_file_is_not(
    choices: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval_module, "find_spec", lambda _: None)
    monkeypatch.setattr(task_scores_module, "load_lm_eval", lm_eval_module.load_lm_eval)
    assert len(load_task_sets(choices[:1])[0].items) == len(ROWS)
    with pytest.raises(UsageError, match=r"U575.*piqa.*pip install"):
        load_task_sets(["piqa"])
    with pytest.raises(DataError, match=r"D450.*there-is-none\.jsonl"):
        load_task_sets(["there-is-none.jsonl"])


@there
@noisy
@pytest.mark.parametrize("plan", every(3, ["0,[1-2]x2,3-4", "0-4", "0,3-4"]))
def test_lm_evals_own_command_line_scores_a_plan_as_we_do(
    choices: tuple[Path, Path], plan: str, tmp_path: Path, loaded: Loaded
) -> None:
    folder = str(model_folder(tmp_path / "model"))
    asked = json.dumps({"pretrained": folder, "plan": plan, "dtype": "float32"})
    command = [sys.executable, "-m", "shoal.lm_eval", "run", "--model", "shoal", "--model_args", asked, "--tasks",
               str(choices[1]), "--output_path", str(tmp_path / "out"), "--log_samples",
               "--device", "cpu"]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    theirs = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]["theirs"]
    found = load(folder, device="cpu", dtype="float32")
    with running(found.model, plan):
        own = task_scores(found.model, found.tokenizer, load_task_sets(choices[:1]))["own"]
    assert theirs["acc,none"] == own.accuracy
    assert theirs["acc_norm,none"] == pytest.approx(own.normalised)


@there
def test_a_plan_that_cannot_run_is_one_sentence_of_lm_evals_command_line(
    choices: tuple[Path, Path], tmp_path: Path
) -> None:
    asked = json.dumps({"pretrained": str(model_folder(tmp_path / "model")), "plan": "0,9"})
    command = [sys.executable, "-m", "shoal.lm_eval", "run", "--model", "shoal", "--model_args", asked, "--tasks",
               str(choices[1])]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr and "shoal: P1" in ran.stderr
