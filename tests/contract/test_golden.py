"""Files, texts and names of earlier versions, read with the code of the day (`tests/golden`; its `make.py` wrote them).

A set is never made anew: a test that fails here says that something which users have on their disks, or in their
fingers, means something else than it did.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.api.calibrate import calibrate
from shoal.api.compare import compare
from shoal.models.stacks import find_stack
from tests.golden.corrected import CORRECTED
from tests.golden.facts import CALIBRATED, COMPARED, FACTS, SEARCHES, opened
from tests.golden.names import names

SETS = sorted(path for path in (Path(__file__).parents[1] / "golden").iterdir() if path.name.startswith("set"))
EXACT, FIGURES = (1e-9, 1e-11), (1e-5, 1e-6)
"""Relative and absolute. Everything runs in float64, where kernels differ by 1e-15; losses are summed up from float32
(5e-8 between the kernels of two processors), and whoever makes such a sum better stays within 1e-6."""


@pytest.fixture(params=SETS, ids=lambda path: path.name)
def kept(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the set, in which the test runs; the set itself."""
    shutil.copytree(request.param, tmp_path / "set")
    monkeypatch.chdir(tmp_path / "set")
    found: Path = request.param
    return found


def stored(name: str) -> Any:
    return json.loads(Path(f"{name}.json").read_bytes())


def differences(old: Any, new: Any, tolerance: tuple[float, float] = EXACT, where: str = "") -> list[str]:
    """Where `new` lacks or changes what is in `old`; a key or a name more is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        gone = [f"{where}/{key} is gone" for key in old if key not in new]
        return gone + [found for key in old if key in new
                       for found in differences(old[key], new[key], tolerance, f"{where}/{key}")]  # fmt: skip
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [found for at, pair in enumerate(zip(old, new, strict=True))
                for found in differences(*pair, tolerance, f"{where}/{at}")]  # fmt: skip
    if isinstance(old, float) and isinstance(new, float | int):
        return (
            [] if math.isclose(old, new, rel_tol=tolerance[0], abs_tol=tolerance[1]) else [f"{where}: {old} -> {new}"]
        )
    return [] if old == new else [f"{where}: {old!r:.80} -> {new!r:.80}"]


@pytest.mark.parametrize("what", FACTS)
def test_what_was_kept_means_what_it_meant(kept: Path, what: str) -> None:
    found, old = json.loads(json.dumps(FACTS[what]())), stored(what)
    tolerance = FIGURES if what == "figures" else EXACT
    corrected = CORRECTED.get(kept.name, {}).get(what, {})
    rest = {key: value for key, value in old.items() if key not in corrected}
    assert differences(rest, found, tolerance) == []
    assert [key for key in corrected if differences(old[key], found[key], tolerance) == []] == []


def searched(name: str, calls: list[None] | None = None) -> dict[str, Any]:
    """The search of one journal, gone on with; `calls` gets an entry for each run of the last layer's mlp."""
    loaded = opened()
    if calls is not None:
        find_stack(loaded.model).layer(4).mlp.register_forward_hook(lambda *_: calls.append(None))
    pruned = shoal.prune(loaded, drop=2, writable=False, journal=Path(f"{name}.jsonl"), **SEARCHES[name])
    return {"plan": str(pruned.plan), "trace": [[one.notation, one.score] for one in pruned.found.trace]}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_journal_is_gone_on_with_and_nothing_computed_again(kept: Path, name: str) -> None:
    before, calls = Path(f"{name}.jsonl").read_bytes(), list[None]()
    assert searched(name, calls) == stored("searches")[name]
    assert Path(f"{name}.jsonl").read_bytes() == before
    dense = SEARCHES[name]["limit"]
    inspecting = 2  # one token twice, to find out what a layer is
    assert dense <= len(calls) <= dense + inspecting


def test_a_journal_that_was_cut_off_ends_as_it_would_have(kept: Path) -> None:
    lines = Path("journal.jsonl").read_text(encoding="utf-8").splitlines()
    Path("journal.jsonl").write_text("\n".join(lines[:4]) + '\n{"plan": "0-', encoding="utf-8")
    assert differences(stored("searches")["journal"], searched("journal"), FIGURES) == []

    def values(texts: list[str]) -> dict[str, float]:
        read = [json.loads(text) for text in texts if text.endswith("}")]
        return {one["plan"]: one["nll"] for one in read if "plan" in one}

    again = Path("journal.jsonl").read_text(encoding="utf-8").splitlines()
    assert differences(values(lines), values(again), FIGURES) == []
    assert len(values(again)) == len(values(lines)) == len(lines) - 1


def test_a_policy_is_chosen_again_from_its_recorded_exits(kept: Path) -> None:
    found = json.loads(json.dumps(calibrate("model", device="cpu", **CALIBRATED).file.to_dict()))
    old = stored("policy")
    assert differences({key: old[key] for key in old if key != "made"}, found) == []


def test_a_comparison_is_gone_on_with_and_no_cell_runs_again(kept: Path) -> None:
    before = Path("compared/cells.jsonl").read_bytes()
    found = compare("model", "compared", device="cpu", **COMPARED)
    assert Path("compared/cells.jsonl").read_bytes() == before
    assert len(found.rows) == 1 + 6
    assert all("result" in row for row in found.rows)


def test_a_folder_that_was_written_passes_its_proof_again(kept: Path) -> None:
    proof = shoal.verify("twice", device="cpu")
    assert proof.passed, proof.failures
    assert proof.against == "the live plan"
    assert differences(json.loads(Path("twice/shoal/proof.json").read_bytes())["format"], "shoal-proof/1") == []


@pytest.mark.parametrize("group", ["python", "plan", "codes"])
def test_no_public_name_is_gone(kept: Path, group: str) -> None:
    assert sorted(set(stored("names")[group]) - set(names()[group])) == []


def test_what_the_docs_imported_can_be_imported(kept: Path) -> None:
    for found in stored("names")["documented"]:
        module, _, name = found.partition(":")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            assert hasattr(import_module(module), name), found


def test_no_verb_option_or_key_of_a_config_file_is_gone(kept: Path) -> None:
    now = names()["verbs"]
    lost = [
        f"{verb} {key}: {' '.join(sorted(set(typed) - set(now.get(verb, {}).get(key, []))))}"
        for verb, keys in stored("names")["verbs"].items()
        for key, typed in keys.items()
        if key not in now.get(verb, {}) or not set(typed) <= set(now[verb][key])
    ]
    assert lost == []


def test_no_registered_name_or_option_is_gone_or_has_another_default(kept: Path) -> None:
    assert differences(stored("names")["registered"], names()["registered"]) == []
