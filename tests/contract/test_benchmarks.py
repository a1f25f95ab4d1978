"""The benchmarks are run by hand, so that an option of theirs that stopped working would be found late."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from shoal.docs import ROOT

COMMANDS = [
    *(p for p in sorted((ROOT / "benchmarks").glob("[a-z]*.py")) if "__main__" in p.read_text(encoding="utf-8")),
    ROOT / "benchmarks/peers/__main__.py",
]


@pytest.mark.parametrize("file", COMMANDS, ids=[str(p.relative_to(ROOT / "benchmarks")) for p in COMMANDS])
def test_a_benchmark_says_how_it_is_called(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), str(ROOT), *sys.path])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(file), run_name="__main__")
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out
