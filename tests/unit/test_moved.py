"""Old names of modules: each still imports, with a note that names the new one."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import shoal
from shoal import _moved

HOME = Path(shoal.__file__).parent


@pytest.mark.parametrize("old", sorted(_moved.MOVED))
def test_what_has_moved_is_where_the_table_says(old: str) -> None:
    assert not (HOME / old.replace(".", "/")).with_suffix(".py").exists(), "it has not moved"
    new = _moved.current(old)
    assert new is not None
    place = HOME / new.replace(".", "/")
    assert place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def test_an_old_name_imports_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    # errors is light: no test here may import torch
    monkeypatch.setitem(_moved.MOVED, "former.mistakes", "errors")
    monkeypatch.setitem(_moved.MOVED, "olden.mistakes", "former.mistakes")
    for old in ("former.mistakes", "olden.mistakes"):
        with pytest.warns(DeprecationWarning, match=rf"shoal\.{old} is now shoal\.errors; import it from there"):
            found = importlib.import_module(f"shoal.{old}")
        assert found.ShoalError is shoal.errors.ShoalError


def test_what_lies_below_a_package_moves_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_moved.MOVED, "schemes", "plan")
    assert _moved.current("schemes.steps") == "plan.steps"
    assert _moved.current("plan.steps") is None
    with pytest.warns(DeprecationWarning, match="is now shoal"):
        steps = importlib.import_module("shoal.schemes.steps")
    assert steps.Run is importlib.import_module("shoal.plan.steps").Run


def test_a_name_that_never_was_is_still_an_error() -> None:
    for name in ("shoal.no_such_room", "shoal.run.no_such_module"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)


def test_the_note_reaches_a_user_file() -> None:
    code = "from shoal.run.gates import Policy; from shoal.run import policies"
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert "shoal.run.gates is now shoal.deciding.policy" in done.stderr


def test_a_class_that_was_renamed_with_its_module_has_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_moved.MOVED, "before.mistakes", "errors")
    monkeypatch.setitem(_moved.RENAMED, "Mistake", "ShoalError")
    with pytest.warns(DeprecationWarning, match="shoal.before.mistakes is now shoal.errors"):
        found = importlib.import_module("shoal.before.mistakes")
    assert found.Mistake is found.ShoalError is shoal.errors.ShoalError
    with pytest.raises(AttributeError, match="Unheard"):
        _ = found.Unheard
