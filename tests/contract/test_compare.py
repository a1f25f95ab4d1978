"""compare: cells that are kept, gone on with, the same again, and the same from Ray."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.api import budget as budget_module
from shoal.api import compare as compare_module
from shoal.api import harness as harness_module
from shoal.api.compare import Compared, compare, publish
from shoal.api.distribute import distribute
from shoal.api.study import ExpectedSeconds, Protocol, cells
from shoal.cli import app
from shoal.errors import DataError, UsageError
from shoal.evaluation.cluster_resources import Cluster
from shoal.models.load import Loaded, load

from .test_api import model_folder

PROTOCOL = Protocol(length=16, limit=2, window=16, windows=2, new_tokens=0, pairs=0, compared=1)
FULL = Protocol(length=16, limit=2, window=16, windows=2, new_tokens=1, prompt=4, decoded=1, pairs=1, compared=1)
METHODS = ("shortgpt", "position:which=first")
BUDGETS = ("layers=0.8,0.6",)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Loaded:
    return load(tiny_folder, device="cpu")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "words.jsonl"
    path.write_text("".join(json.dumps({"context": f"the {i}", "continuation": "end"}) + "\n" for i in range(4)))
    return path


def run(loaded: Loaded, place: Path, **options: Any) -> Compared:
    asked = {"methods": METHODS, "budgets": BUDGETS, "protocol": PROTOCOL} | options
    return compare(loaded, place, **asked)


def results(found: Compared) -> list[Any]:
    return [(row["key"], row.get("result"), row.get("error")) for row in found.rows]


@pytest.fixture(scope="module")
def first(loaded: Loaded, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    place = tmp_path_factory.mktemp("results")
    return run(loaded, place, protocol=replace(FULL, tasks=(str(tasks),)))


def test_every_cell_has_its_plan_its_quality_and_its_times(first: Compared) -> None:
    assert [row["key"] for row in first.rows][:2] == ["dense", "shortgpt layers=0.8 seed=0"]
    assert len(first.rows) == 1 + 2 * 2
    for row in first.rows[1:]:
        assert "error" not in row
        assert row["result"]["price"] <= float(row["budget"].split("=")[1])
        assert row["result"]["perplexity"]["builtin"] > 1 and 0 <= row["result"]["tasks"]["words"]["accuracy"] <= 1
        assert row["measured"]["decode"]["median"] > 0 and row["measured"]["seconds"] > 0
    first_layers = next(row for row in first.rows if row["key"].startswith("position:which=first layers=0.6"))
    assert first_layers["result"]["plan"] == "2-4"


def test_a_search_for_a_smaller_budget_is_told_what_the_larger_one_ran(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = run(loaded, tmp_path / "both", methods=("sleb",))
    alone = run(loaded, tmp_path / "alone", methods=("sleb",), budgets=("layers=0.6",))
    assert results(both)[-1] == results(alone)[-1]
    memos = []
    true = harness_module.prune

    def spied(*args: Any, **options: Any) -> Any:
        memos.append(options["memo"])
        before = memos[-1].saved
        found = true(*args, **options)
        memos[-1].saved += 1000 * (memos[-1].saved > before)
        return found

    monkeypatch.setattr(harness_module, "prune", spied)
    rows = run(loaded, tmp_path / "timed", methods=("sleb",)).rows
    seconds = [row["measured"]["seconds"] for row in rows[1:]]
    assert seconds[0] < 500 < seconds[1]  # what was reused counts as if it had been run


def test_the_silent_layer_goes_first_and_changes_nothing(first: Compared) -> None:
    dense, row = first.rows[:2]
    assert row["result"]["plan"] == "0-1,3-4" and row["result"]["kl"] == 0
    assert row["result"]["perplexity"] == dense["result"]["perplexity"]


def test_a_second_run_gives_the_same_table_and_another_folder_too(
    first: Compared, loaded: Loaded, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = replace(FULL, tasks=(str(tasks),))
    assert results(run(loaded, tmp_path, protocol=protocol)) == results(first)
    monkeypatch.setattr(harness_module.Harness, "row", lambda *_: pytest.fail("a finished cell ran again"))
    again = run(loaded, first.folder, protocol=protocol)
    assert again.rows == first.rows


def test_a_run_that_was_cut_off_goes_on_without_repeating_cells(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ran = harness_module.Harness.row, list[Any]()

    def row(self: Any, cell: Any) -> Any:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(cell)
        return whole(self, cell)

    with monkeypatch.context() as patch:
        patch.setattr(harness_module.Harness, "row", row)
        with pytest.raises(KeyboardInterrupt):
            run(loaded, tmp_path)
    with (tmp_path / "cells.jsonl").open("a") as stream:
        stream.write('{"key": "shortgpt layers=0.6 see')  # what a kill leaves of a line
    later = list[Any]()
    monkeypatch.setattr(harness_module.Harness, "row", lambda self, cell: later.append(cell) or whole(self, cell))
    found = run(loaded, tmp_path)
    assert len(later) == 3 and not set(later) & set(ran) and len(found.rows) == 5
    assert all("result" in row for row in found.rows)


def test_a_method_that_fails_is_a_row_with_its_error(loaded: Loaded, tmp_path: Path) -> None:
    found = run(loaded, tmp_path, methods=("shortgpt:skip_first=900", "position"), budgets=("layers=0.8",))
    assert found.rows[1]["error"].startswith("U508") and "result" in found.rows[2]
    assert any("U508" in str(cell) for line in found.table()[1] for cell in line)


def test_seeds_take_other_windows_of_the_calibration_text(loaded: Loaded, tmp_path: Path) -> None:
    harness = harness_module.Harness.of(loaded, PROTOCOL, tmp_path)
    assert harness.calibration(0).info.sha256 == harness.calibration(0).info.sha256
    assert len({harness.calibration(seed).info.sha256 for seed in (0, 1, 2)}) == 3


def test_results_of_another_comparison_are_refused(loaded: Loaded, tmp_path: Path) -> None:
    run(loaded, tmp_path, methods=("position",), budgets=("layers=0.8",))
    before = (tmp_path / "cells.jsonl").read_bytes()
    with pytest.raises(DataError, match=r"D460.*protocol"):
        run(loaded, tmp_path, methods=("position",), protocol=replace(PROTOCOL, length=24))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="D460"):
        run(loaded, tmp_path / "file", methods=("position",))
    assert (tmp_path / "cells.jsonl").read_bytes() == before
    (tmp_path / "cells.jsonl").write_text("my notes\n")
    with pytest.raises(DataError, match="D460"):
        run(loaded, tmp_path, methods=("position",), budgets=("layers=0.8",))
    assert (tmp_path / "cells.jsonl").read_text() == "my notes\n"


def test_a_budget_that_cannot_be_met_is_refused_before_anything_runs(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="U523"):
        run(loaded, tmp_path / "new", budgets=("speed=0.5",))
    assert not (tmp_path / "new").exists()


def test_the_verb_writes_table_and_page(tiny_folder: Path, tmp_path: Path) -> None:
    options = "--length 16 --limit 2 --window 16 --windows 2 --new 0 --pairs 0 -q"
    verb = [
        "compare",
        str(tiny_folder),
        "--output",
        str(tmp_path / "r"),
        "-m",
        "shortgpt",
        "-m",
        "position:which=first",
    ]
    done = CliRunner().invoke(app, [*verb, "-b", "layers=0.8", *options.split(), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert [row["key"] for row in said["rows"]][1:] == [
        "shortgpt layers=0.8 seed=0",
        "position:which=first layers=0.8 seed=0",
    ]
    assert said["advice"][0].startswith("At layers=0.8 use ")
    assert "| layers=0.8 | shortgpt |" in (tmp_path / "r" / "results.md").read_text()
    assert "Methods compared" in (tmp_path / "r" / "report.html").read_text()
    dry = CliRunner().invoke(app, [*verb, "-b", "layers=0.8", "--dry-run"])
    assert dry.exit_code == 0 and "2 cells" in dry.stdout


def test_ray_that_is_not_there_is_one_sentence(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match=r"U571.*pip install"):
        run(loaded, tmp_path, ray="local")


def one_after_the_other(worker: Any, items: Any, **_: Any) -> Any:
    """What Ray does, in this process."""
    return (worker.row(item) for item in items)


def test_what_workers_found_is_timed_afterwards_and_a_kill_in_between_repeats_no_cell(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"methods": ("shortgpt", "replaceme"), "budgets": ("layers=0.8",), "protocol": FULL}
    alone = run(loaded, tmp_path / "alone", **asked)
    monkeypatch.setattr(compare_module, "distribute", one_after_the_other)
    with monkeypatch.context() as patch:
        patch.setattr(harness_module, "speed", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(loaded, tmp_path / "spread", ray="local", **asked)
    held = list((tmp_path / "spread" / "untimed").iterdir())
    assert [path.name.partition("_")[0] for path in held] == ["replaceme"]
    with monkeypatch.context() as patch:
        patch.setattr(harness_module.Harness, "row", lambda *_: pytest.fail("a finished cell ran again"))
        found = run(loaded, tmp_path / "spread", ray="local", **asked)
    assert results(found) == results(alone) and found.rows[2]["result"]["weights"]
    assert all(row["measured"]["decode"]["median"] > 0 for row in found.rows[1:])
    assert not (tmp_path / "spread" / "untimed").exists()


def test_tensors_that_were_lost_before_their_plan_was_timed_are_found_again(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"methods": ("replaceme",), "budgets": ("layers=0.8",), "protocol": FULL, "ray": "local"}
    monkeypatch.setattr(compare_module, "distribute", one_after_the_other)
    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "_timed", lambda *_: ())
        assert "decode" not in run(loaded, tmp_path, **asked).rows[1]["measured"]
    for path in (tmp_path / "untimed").iterdir():
        path.unlink()
    assert run(loaded, tmp_path, **asked).rows[1]["measured"]["decode"]["median"] > 0


def test_two_methods_that_find_one_plan_are_judged_and_timed_once(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    for name in ("_quality", "_times"):
        whole = getattr(harness_module.Harness, name)
        wrapped = lambda self, *rest, name=name, whole=whole: ran.append(name) or whole(self, *rest)  # noqa: E731
        monkeypatch.setattr(harness_module.Harness, name, wrapped)
    asked: dict[str, Any] = {"budgets": ("layers=0.8",), "protocol": FULL}
    first = run(loaded, tmp_path, methods=("position:which=first",), **asked)
    assert ran == ["_quality", "_quality", "_times"]
    # another name for the same, and another process, which knows it from the file
    both = run(loaded, tmp_path, methods=("position:which=first", "position: which=first"), **asked)
    assert ran == ["_quality", "_quality", "_times"]
    assert both.rows[2]["key"] != both.rows[1]["key"] and both.rows[2]["result"] == first.rows[1]["result"]


def test_the_seconds_of_a_search_hold_no_timing_of_its_result(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_module, "measured_share", lambda *_, **__: pytest.fail("timed within the search"))
    found = run(loaded, tmp_path, methods=("position",), budgets=("decode=0.9",), protocol=replace(PROTOCOL, prompt=8))
    assert found.rows[1]["result"]["price"] <= 0.9


def test_the_longest_cells_go_first() -> None:
    asked = cells(["position", "sleb", "shortgpt"], ["layers=0.9,0.5"], [0])
    known = ExpectedSeconds(
        [{"method": "shortgpt", "measured": {"seconds": 2.0}}, {"method": "position", "error": "U5"}]
    )
    order = [cell.key[:-7] if cell else "dense" for cell in sorted([None, *asked], key=known, reverse=True)]
    wanted = [f"{name} layers={share}" for name in ("sleb", "shortgpt", "position") for share in ("0.5", "0.9")]
    assert order == ["dense", *wanted]
    known.learn({"method": "sleb", "measured": {"seconds": 1.0}})
    assert max(asked, key=known).key == "shortgpt layers=0.5 seed=0"


def test_cells_whose_searches_begin_alike_run_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: dict[int, list[str]] = {0: [], 1: []}

    class Pool:
        def fed(self, choose: Any) -> Any:
            for place in (0, 1, 1, 0, 1, 0, 1):
                if (job := choose(place)) is not None:
                    ran[place].append(job[0].key[:-7])
                    yield {"method": job[0].method, "measured": {"seconds": 1.0}}

    monkeypatch.setattr("shoal.api.distribute.machines", lambda *_: contextlib.nullcontext(Pool()))
    asked = cells(["sleb", "position"], ["layers=0.9,0.5"], [0])
    cluster, worker = Cluster("local", 2), SimpleNamespace(loaded=None, on=lambda loaded: None)
    rows = list(distribute(worker, asked, cluster=cluster, expected=ExpectedSeconds()))
    assert len(rows) == 4
    assert ran == {0: ["sleb layers=0.5", "sleb layers=0.9"], 1: ["position layers=0.5", "position layers=0.9"]}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray; runs where it is installed")
def test_ray_gives_the_same_table(first: Compared, loaded: Loaded, tasks: Path, tmp_path: Path) -> None:
    protocol = replace(FULL, tasks=(str(tasks),))
    assert results(run(loaded, tmp_path, protocol=protocol, ray="local", workers=2)) == results(first)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray; runs where it is installed")
def test_ray_gives_the_same_table_where_each_worker_streams(loaded: Loaded, tiny_folder: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"methods": ("shortgpt", "sleb"), "budgets": ("layers=0.8",)}
    streamed = load(tiny_folder, device="cpu", stream=True)
    there = run(streamed, tmp_path / "there", **asked, ray="local", workers=2)
    assert results(there) == results(run(loaded, tmp_path / "here", **asked))


def test_the_page_of_a_comparison_names_the_protocol(first: Compared) -> None:
    page = publish(first).read_text()
    assert "task items" in page and "words" in (first.folder / "results.md").read_text()
