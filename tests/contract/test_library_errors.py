"""What other libraries raise on a user's input is one sentence with a code, and no traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from shoal.cli import app
from shoal.cli._errors import TRACEBACK, in_words
from shoal.errors import ModelError, UsageError, WriteError
from shoal.models.load import inspect_source, load
from shoal.models.quantised import require_quantiser
from shoal.plan import Plan
from shoal.writing.stream import stream

from .families import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folder") / "model"
    tiny("llama").save_pretrained(place)
    return place


def raising(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FileNotFoundError(2, "No such file or directory", "x.txt"), "U630", "x.txt: No such file or directory"),
        (OSError("odd"), "U630", "odd"),
        (MemoryError(), "U631", "MemoryError"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "U631", "CUDA out of memory"),
        (torch.OutOfMemoryError("Tried to allocate: out of memory"), "U631", "--device-map auto"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "U631", "--stream"),
        (OSError(12, "Cannot allocate memory"), "U631", "--stream"),
        (ImportError("No module named 'einops'"), "U632", "einops"),
        (KeyError("steps"), "U639", "KeyError 'steps'"),
        (UsageError("known", code="U500"), "U500", "known"),
    ],
)
def test_every_error_has_words(error: Exception, code: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACEBACK, raising=False)
    said = in_words(error)
    assert said is not None
    assert said.code == code
    assert words in str(said)
    assert len(str(said).splitlines()) == 1


def test_a_fault_of_shoal_is_a_sentence_unless_its_traceback_is_wanted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.models.load.check_source", raising(KeyError("steps")))
    monkeypatch.setenv(TRACEBACK, "1")
    assert isinstance(CliRunner().invoke(app, ["inspect", str(folder)]).exception, KeyError)
    monkeypatch.delenv(TRACEBACK)
    result = CliRunner().invoke(app, ["inspect", str(folder)])
    assert result.exit_code == 1
    assert result.stderr.startswith("shoal: U639: KeyError")
    assert "Traceback" not in result.output


def test_a_model_that_does_not_fit_on_its_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "to", raising(RuntimeError("out of memory")))
    with pytest.raises(ModelError, match="cannot be put on cpu: out of memory; spread it with --device-map") as raised:
        load(folder, device="cpu")
    assert raised.value.code == "M355"


def test_a_quantiser_that_refuses_the_machine() -> None:
    config = tiny("llama").config.__class__(quantization_config={"quant_method": "nvfp4"})
    with pytest.raises(ModelError, match="nvfp4") as raised:
        require_quantiser(config, "x")
    assert raised.value.code == "M356"


def test_a_generation_config_that_its_class_refuses(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.identity(inspect_source(folder))
    monkeypatch.setattr("transformers.GenerationConfig.from_pretrained", raising(ValueError("odd")))
    with pytest.raises(WriteError, match="cannot be read: odd") as raised:
        stream(folder, plan, tmp_path / "out")
    assert raised.value.code == "W270"
    assert not (tmp_path / "out").exists()
