"""--track: what healing, searches, comparisons and measures tell a tracker, here one that writes lines to a file."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from typer.testing import CliRunner

from shoal.api.compare import compare
from shoal.api.heal import heal
from shoal.api.measuring import measure_several
from shoal.api.prune import prune
from shoal.api.study import Protocol
from shoal.cli import app
from shoal.errors import ShoalNote, UsageError
from shoal.models.load import Loaded, load
from shoal.report.tracking import TRACKERS, require_trackers, tracking

from .planted import random_data
from .test_api import model_folder

DATA = random_data(4, 16)
FAKE = """
import json, pathlib
FILE = pathlib.Path(__file__).with_suffix(".jsonl")

def write(**line):
    if line.get("step", 0) >= FAILS:
        raise OSError("the disk is full")
    with FILE.open("a") as file:
        file.write(json.dumps(line) + chr(10))

class Run:
    def __init__(self, project, name):
        write(project=project, name=name)
        self.config = self

    def update(self, values, **_):
        write(config=values)

    def log(self, values, step=None):
        write(step=step, **values)

    def finish(self):
        write(finished=True)

def init(project, name=None):
    if FAILS < 0:
        raise ConnectionError("no account")
    global config
    config = Run(project, name)
    return config
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(model_folder(tmp_path_factory.mktemp("model")), device="cpu")


class Trackio:
    """A module `trackio` that this process finds, and what it was told."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def write(self, fails: float) -> None:
        """`fails`: the step from which on it raises; below 0 it does not start."""
        (self.place / "trackio.py").write_text(FAKE.replace("FAILS", str(fails)))

    def lines(self) -> list[dict[str, Any]]:
        file = self.place / "trackio.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines() if "step" in line]


@pytest.fixture
def trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trackio]:
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    fake = Trackio(tmp_path)
    fake.write(1e9)
    yield fake
    sys.modules.pop("trackio", None)


def test_every_name_of_the_table_is_one_of_accelerate() -> None:
    assert set(TRACKERS) <= set(LOGGER_TYPE_TO_CLASS)
    for name, known in TRACKERS.items():
        assert LOGGER_TYPE_TO_CLASS[name].requires_logging_directory == (known.folder is not None), name


def test_each_trial_of_a_search_is_told_and_nothing_of_it_changes(loaded: Loaded, trackio: Trackio) -> None:
    asked: dict[str, Any] = {"method": "sleb", "drop": 2, "data": DATA, "writable": False}
    told = prune(loaded, **asked, track=["trackio"])
    assert told.found == prune(loaded, **asked).found
    lines = trackio.lines()
    assert lines[0]["project"] == "shoal" and lines[0]["name"].startswith("prune-")
    assert lines[1]["config"] == {"model": loaded.source, "method": "sleb"}
    trials = [line for line in lines if "objective" in line]
    whole = loaded.opened.spec.stack(None).depth
    assert len({trial["plan"] for trial in trials}) == len(trials) >= whole
    assert all(0 < trial["cost/params"] < 1 and trial["cost/layers"] in (0.8, 0.6) for trial in trials)
    assert {one.notation for one in told.found.trace} <= {trial["plan"] for trial in trials}
    assert lines[-2]["found/plan"] == str(told.plan) and lines[-1] == {"finished": True}
    steps = [line["step"] for line in trackio.steps()]
    assert steps == list(range(len(steps))), "some trackers leave out what goes back"


def test_a_budget_says_what_it_predicts(loaded: Loaded, trackio: Trackio) -> None:
    found = prune(loaded, method="sleb", budget="params=0.85", data=DATA, writable=False, track=["trackio"])
    assert found.price is not None
    last = next(line for line in trackio.steps() if "found/plan" in line)
    assert last["found/predicted"] == pytest.approx(found.price["price"])
    assert all("cost/predicted" in line for line in trackio.steps() if "objective" in line)


def test_a_method_without_a_search_tells_the_plans_on_its_way(loaded: Loaded, trackio: Trackio) -> None:
    found = prune(loaded, method="shortgpt", drop=2, data=DATA, writable=False, track=["trackio"])
    assert [line["trace/plan"] for line in trackio.steps()[:-1]] == [one.notation for one in found.found.trace]


def test_each_cell_of_a_comparison_is_told(loaded: Loaded, trackio: Trackio, tmp_path: Path) -> None:
    protocol = Protocol(length=16, limit=2, window=16, windows=2, new_tokens=0, pairs=0, compared=1)
    asked: dict[str, Any] = {"methods": ("shortgpt", "position"), "budgets": ("layers=0.8",), "protocol": protocol}
    found = compare(loaded, tmp_path / "cells", **asked, track=["trackio"])
    assert [line["cell"] for line in trackio.steps()] == [row["key"] for row in found.rows]
    for line, row in zip(trackio.steps(), found.rows, strict=True):
        assert line["perplexity/builtin"] == row["result"]["perplexity"]["builtin"]
        assert line.get("plan") == row["result"].get("plan")


def test_scores_are_told_layer_by_layer(loaded: Loaded, trackio: Trackio) -> None:
    found = measure_several(loaded, ["block-influence", "magnitude"], data=[DATA], track=["trackio"])
    assert [line["block-influence"] for line in trackio.steps()] == list(found.scores["block-influence"].values)
    assert "block-influence error" in trackio.steps()[0] and "magnitude" in trackio.steps()[0]


def test_healing_tells_each_step(loaded: Loaded, trackio: Trackio) -> None:
    asked: dict[str, Any] = {"tokens": 128, "data": random_data(12, 16), "watch": DATA, "held": 2, "seed": 3}
    told = heal(loaded, "0-1,3-4", **asked, track=["trackio"])
    curve = [entry for stage in told.stages for entry in stage.get("curve", ())]
    assert [line["loss"] for line in trackio.steps() if "loss" in line] == [e["loss"] for e in curve if "loss" in e]
    assert any("held_loss" in line for line in trackio.steps()) and trackio.lines()[-1] == {"finished": True}
    again = heal(loaded, "0-1,3-4", **asked)
    assert {name: told.weights[name].equal(again.weights[name]) for name in again.weights} == dict.fromkeys(
        told.weights, True
    )


@pytest.mark.parametrize("verb", ["prune", "heal"])
def test_a_tracker_that_fails_ends_no_run(loaded: Loaded, trackio: Trackio, verb: str) -> None:
    trackio.write(2)
    asked: dict[str, Any] = {"method": "sleb", "drop": 1, "data": DATA, "writable": False}
    healed: dict[str, Any] = {"tokens": 128, "data": random_data(12, 16), "watch": DATA, "held": 2}
    run = partial(prune, loaded, **asked) if verb == "prune" else partial(heal, loaded, "0-1,3-4", **healed)
    with pytest.warns(ShoalNote, match=r"trackio failed \(.*the disk is full.*the run goes on without it"):
        found = run(track=["trackio"])
    assert str(found.plan) == str(run().plan)
    assert [line["step"] for line in trackio.steps()] in ([0, 1], [0, 0, 1], [0, 1, 1])


def test_one_that_does_not_start_is_one_sentence(loaded: Loaded, trackio: Trackio) -> None:
    trackio.write(-1)
    with pytest.raises(UsageError, match=r"U769.*trackio.*no account"):
        prune(loaded, method="sleb", drop=1, data=DATA, writable=False, track=["trackio"])


def test_names_and_packages_are_asked_for_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"U767.*'graphite'.*tensorboard"):
        require_trackers(["graphite"])
    monkeypatch.setattr("shoal.report.tracking.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"U768.*pip install comet-ml"):
        require_trackers(["comet-ml"])
    monkeypatch.setattr("shoal.report.tracking.find_spec", lambda name: None if name == "accelerate" else name)
    assert require_trackers([]) == ()
    with pytest.raises(UsageError, match=r"U768.*pip install accelerate"):
        require_trackers(["wandb"])


@pytest.mark.parametrize("verb", [["prune"], ["heal", "--plan", "0"], ["measure"], ["compare", "--output", "x"]])
def test_every_verb_refuses_a_name_that_is_none(verb: list[str]) -> None:
    done = CliRunner().invoke(app, [verb[0], "nowhere", *verb[1:], "--track", "graphite"])
    assert done.exit_code == 2 and "U767" in done.output and "Traceback" not in done.output


def test_numbers_that_are_none_and_odd_names_are_kept_from_trackers(trackio: Trackio) -> None:
    with tracking(["trackio"], "prune", {"stack": None}) as told:
        told.log({"a:b=c/d": 1.0, "lost": float("nan"), "none": None, "text": "0-3"})
        told.log({"loss": 2.0}, 0)
        told.log({"loss": 1.0}, 9)
        told.log({"loss": 3.0}, 0)
    assert trackio.steps()[0] == {"step": 0, "a_b_c/d": 1.0, "text": "0-3"}
    assert [line["step"] for line in trackio.steps()] == [0, 0, 9, 9]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None and importlib.util.find_spec("tensorboardX") is None,
    reason="needs tensorboard or tensorboardX; runs where one is installed",
)
def test_tensorboard_has_files_of_its_own(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    prune(loaded, method="sleb", drop=1, data=DATA, writable=False, track=["tensorboard"])
    heal(loaded, "0-1,3-4", tokens=128, data=random_data(12, 16), watch=DATA, held=2, track=["tensorboard"])
    files = [file.relative_to(tmp_path).parts[0][:4] for file in tmp_path.rglob("events.out.tfevents.*")]
    assert {"prun", "heal"} <= set(files)
