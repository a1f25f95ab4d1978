"""What may be written where: refusals before any work, failures on the way, and how a folder takes its place."""

from __future__ import annotations

import copy
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaModel

from shoal import atomic
from shoal.errors import PlanError, WriteError
from shoal.models.load import Loaded
from shoal.plan import load_plan
from shoal.writing import folder as folder_module
from shoal.writing import proof as proof_module
from shoal.writing.folder import refuse_output, write
from shoal.writing.proof import Proof

from .families import tiny
from .test_write import loaded_of, plan_of, quick


def refused(code: str, output: Path, text: str = "0,2-3", **options: Any) -> str:
    before = sorted(output.parent.rglob("*")) if output.parent.exists() else None
    with pytest.raises((WriteError, PlanError)) as caught:
        quick(output, text, **options)
    assert caught.value.code == code
    assert (sorted(output.parent.rglob("*")) if output.parent.exists() else None) == before
    return str(caught.value)


def test_outputs_that_must_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    message = refused("W220", tmp_path / "there")
    assert str(tmp_path / "there") in message and "--overwrite" in message
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.png").touch()
    refused("W225", tmp_path / "photos", overwrite=True)
    (tmp_path / "file").touch()
    refused("W225", tmp_path / "file", overwrite=True)
    refused("W222", tmp_path / "no" / "such" / "out")
    base = tmp_path / "base"
    tiny("llama").save_pretrained(base)
    loaded = loaded_of(source=str(base), folder=base)
    for place in (base, base / "inside"):
        refused("W221", place, loaded=loaded, overwrite=True)
    refused("W221", tmp_path, loaded=loaded, overwrite=True)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "0.00 GB free" in refused("W223", tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused("W224", tmp_path / "out")
    monkeypatch.undo()
    refuse_output(tmp_path / "new")


def test_plans_and_models_that_cannot_be_written(tmp_path: Path) -> None:
    refused("W201", tmp_path / "out", "0,1a,2-3")
    refused("W202", tmp_path / "out", "0,(1|2),3")
    refused("W203", tmp_path / "out", "0-1,2@1,3")
    with torch.device("meta"):
        unknown = type("Unknown", (LlamaModel,), {})(tiny("llama").config)  # which no Auto class makes
        ghost = type(tiny("llama"))(tiny("llama").config)
    for code, model in (("W214", ghost), ("W215", unknown.to_empty(device="cpu"))):
        with pytest.raises(WriteError) as caught:
            write(Loaded(model, None, "x"), plan_of(tiny("llama"), "0"), tmp_path / "out")
        assert caught.value.code == code
    other = plan_of(tiny("gpt2"), "0-1")
    with pytest.raises(PlanError) as wrong:
        write(loaded_of(), other, tmp_path / "out")
    assert wrong.value.code == "P101" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "W223"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "W223"),
        (Exception("No space left on device (os error 28)"), "W223"),
        (PermissionError(errno.EACCES, "Permission denied"), "W224"),
        (OSError(errno.EIO, "Input/output error"), "W226"),
        (ValueError("GenerationConfig is invalid: ..."), "W216"),
        (KeyboardInterrupt(), None),
    ],
    ids=["full", "full in safetensors", "full in tokenizers", "read-only", "broken", "config", "Ctrl-C"],
)
def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: str | None, old: bool
) -> None:
    if old:
        quick(tmp_path / "out", "0-1")
    before = sorted(tmp_path.rglob("*"))
    save = type(tiny("llama")).save_pretrained

    def fails(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        raise failure

    monkeypatch.setattr(type(tiny("llama")), "save_pretrained", fails)
    with pytest.raises(WriteError if code else KeyboardInterrupt) as caught:
        quick(tmp_path / "out", overwrite=True)
    assert code is None or caught.value.code == code  # type: ignore[attr-defined]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_proof_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = folder_module.Proof(False, (proof_module.Check("logits cached", False, 0.25, 1e-4, "how"),))
    monkeypatch.setattr(folder_module, "prove", lambda *_, **__: check)
    with pytest.raises(WriteError, match=r"W230: .*logits cached: 0.25 where 0.0001 is needed"):
        write(loaded_of(), plan_of(tiny("llama"), "0"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_proof_of_a_cast_base_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        folder_module, "prove", lambda *_, **__: Proof(False, (proof_module.Check("x", False, 1, 0, ""),))
    )
    cast = Loaded(copy.deepcopy(tiny("llama")).to(torch.bfloat16), None, "x")
    with pytest.raises(WriteError, match=r"W230: .*load the base with its dtype"):
        write(cast, plan_of(tiny("llama"), "0"), tmp_path / "out")


def test_a_proof_that_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "child.py"
    script.write_text("import sys; sys.exit('no torch here')")
    monkeypatch.setattr(proof_module.proof_child, "__file__", str(script))
    with pytest.raises(WriteError, match=r"W231: .*exit code 1: no torch here"):
        write(loaded_of(), plan_of(tiny("llama"), "0"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [script]


def test_the_fresh_process_has_no_search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(folder_module.__file__).parents[2]))
    assert "PYTHONPATH" not in proof_module._clean_environment()
    monkeypatch.setattr(proof_module.sysconfig, "get_path", lambda kind: "/elsewhere")
    assert proof_module._clean_environment()["PYTHONPATH"].split(os.pathsep) == [str(Path(torch.__file__).parents[1])]


@pytest.fixture(params=["in one step", "by two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "by two renames":
        monkeypatch.setattr(atomic, "swap_paths", lambda *_: False)
    elif sys.platform != "linux":
        pytest.skip("only Linux exchanges two names; runs there")
    return request.param


def test_overwriting_replaces_the_whole_folder(tmp_path: Path, way: str) -> None:
    quick(tmp_path / "out", "0-2")
    (tmp_path / "out" / "left over.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    quick(tmp_path / "link", "3,0", overwrite=True)
    assert str(load_plan(tmp_path / "out")) == "3,0"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out"]
    assert not (tmp_path / "out" / "left over.txt").exists() and (tmp_path / "link").is_symlink()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2


def test_the_old_folder_comes_back_when_the_second_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(tmp_path / "out", "0-2")
    monkeypatch.setattr(atomic, "swap_paths", lambda *_: False)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(WriteError, match="W226"):
        quick(tmp_path / "out", "0", overwrite=True)
    assert str(load_plan(tmp_path / "out")) == "0-2" and len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_while_the_old_folder_is_removed_leaves_the_new_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    quick(tmp_path / "out", "0-2")
    remove, asked = atomic.shutil.rmtree, []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        if Path(args[0]).parent == tmp_path:  # others remove folders of their own meanwhile
            asked.append(args)
            if len(asked) == 1:
                raise KeyboardInterrupt
        remove(*args, **kwargs)

    monkeypatch.setattr(atomic.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "out", "3,0", overwrite=True)
    assert str(load_plan(tmp_path / "out")) == "3,0" and len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_at_any_call_leaves_nothing_beside(tmp_path: Path, way: str) -> None:
    """Ctrl-C on the way into the n-th function that staging calls, for every n; the kills of test_kill are random."""

    def once(number: int) -> bool:
        final, left = tmp_path / f"out{number}", number

        def trace(*_: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        final.mkdir()
        (final / "model").write_text("old")
        before = sys.gettrace()
        try:
            with atomic.staged(final) as partial:
                (partial / "model").write_text("new")
                sys.settrace(trace)
                atomic.publish(partial, final, overwrite=True)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert (final / "model").read_text() in ("old", "new")
        assert [path.name for path in tmp_path.iterdir() if path.name.endswith(("partial", "old"))] == [], number
        return left > 0

    numbers = iter(range(1, 1000))
    while not once(next(numbers)):
        pass
    assert next(numbers) > 20


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def page(_: Proof) -> str:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
        return ""

    with pytest.raises(WriteError, match="W220"):
        quick(tmp_path / "out", page=page)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        "dead": f".out.shoal-{dead.pid}.partial",
        "mine": f".out.shoal-{os.getpid()}.partial",
        "living": f".out.shoal-{sleeper.pid}.partial",
        "other": f".other.shoal-{dead.pid}.partial",
        "strange": ".out.shoal-x.partial",
    }
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    quick(tmp_path / "out")
    left = {name for name, path in names.items() if (tmp_path / path).exists()}
    sleeper.communicate(b"\n")
    assert left == {"living", "other", "strange"}


def test_a_folder_caught_between_two_renames_gets_its_name_back(tmp_path: Path) -> None:
    quick(tmp_path / "out", "0-2")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / "out").rename(tmp_path / f".out.shoal-{dead.pid}.old")
    with pytest.raises(WriteError, match="W220"):
        quick(tmp_path / "out", "0")
    assert str(load_plan(tmp_path / "out")) == "0-2" and len(list(tmp_path.iterdir())) == 1


def test_a_second_write_of_the_same_folder_is_refused(tmp_path: Path) -> None:
    def page(_: Proof) -> str:
        with pytest.raises(WriteError, match="W227"):
            quick(tmp_path / "out")
        return ""

    quick(tmp_path / "out", page=page)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
