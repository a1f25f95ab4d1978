"""A write that is killed or interrupted at any moment leaves the old folder, the new one or none: never half of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import kill_driver
from .shares import every

COUNTS = ((24, 8), (50, 16))
"""Kills and interrupts, by default and with -m slow."""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork; runs on Linux and macOS")


@pytest.fixture(scope="module", params=every(2, COUNTS))
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    kills, interrupts = request.param
    root = tmp_path_factory.mktemp("killed")
    package = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, kill_driver.__file__, str(root), str(kills), str(interrupts)],
        env=os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout) | {"kills": kills, "interrupts": interrupts}  # type: ignore[no-any-return]


def of(outcome: dict[str, Any], number: signal.Signals) -> list[dict[str, Any]]:
    return [result for result in outcome["results"] if result["signal"] == number]


def test_a_killed_write_leaves_a_whole_folder_or_none(outcome: dict[str, Any]) -> None:
    results = of(outcome, signal.SIGKILL)
    assert len(results) == outcome["kills"]
    for result in results:
        assert result["now"] in (result["had"], result["wanted"]), result
        assert os.WIFSIGNALED(result["status"]) or result["now"] == result["wanted"]


def test_the_kills_came_at_all_moments(outcome: dict[str, Any]) -> None:
    killed = [result for result in of(outcome, signal.SIGKILL) if os.WIFSIGNALED(result["status"])]
    assert len(killed) >= outcome["kills"] // 4  # how many are left depends on what else the machine does
    assert sum(result["beside"] > 0 for result in killed) >= outcome["kills"] // 10, "too few in the middle of a write"
    assert len({result["stages"][-1] for result in killed}) >= 2


def test_an_interrupted_write_cleans_up(outcome: dict[str, Any]) -> None:
    results = of(outcome, signal.SIGINT)
    assert len(results) == outcome["interrupts"]
    for result in results:
        assert result["now"] in (result["had"], result["wanted"]), result
        assert result["beside"] == 0, result
        assert os.waitstatus_to_exitcode(result["status"]) in (0, kill_driver.STOPPED), result
    assert any(os.waitstatus_to_exitcode(result["status"]) == kill_driver.STOPPED for result in results)


def test_the_next_write_removes_what_kills_left(outcome: dict[str, Any]) -> None:
    assert outcome["last"] == {"now": "0", "beside": 0}


def test_an_interrupt_during_the_proof_cleans_up(outcome: dict[str, Any]) -> None:
    assert outcome["proving"]["stages"][-1] == "proving"
    assert os.waitstatus_to_exitcode(outcome["proving"]["status"]) == kill_driver.STOPPED
    assert outcome["proving"]["left"] == 0
