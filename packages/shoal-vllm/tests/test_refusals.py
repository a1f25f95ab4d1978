"""Folders that vLLM must not run: one sentence with a code, before or while tensors are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shoal_vllm.greedy import greedy, sentence

from .conftest import FOLDERS


def damaged(tmp_path: Path, kind: str, config: dict[str, Any] | None = None) -> Path:
    shutil.copytree(FOLDERS / "llama" / kind, tmp_path / "m")
    if config is not None:
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    return tmp_path / "m"


def said(folder: Path) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - vLLM wraps it in what it likes
        greedy(str(folder), [[5, 6, 7]], 2, dtype="float32")
    return sentence(caught.value)


@pytest.mark.parametrize(
    ("change", "code"),
    [({"slots": None, "no_slots": "layers run in parallel"}, "W300"), ({"slots": {"format": "shoal-slots/2"}}, "W301")],
)
def test_a_config_that_the_plugin_cannot_read(tmp_path: Path, change: dict[str, Any], code: str) -> None:
    config = json.loads((FOLDERS / "llama" / "loop" / "config.json").read_text())
    assert said(damaged(tmp_path, "loop", config | change)).endswith(f"({code})")


@pytest.mark.parametrize(
    ("lost", "code"),
    [("model.layers.1.self_attn.k_proj.weight", "W307"), ("model.norm.weight", "W307"), ("shoal.m.bias", "W307")],
)
def test_a_lost_tensor(tmp_path: Path, lost: str, code: str) -> None:
    folder = damaged(tmp_path, "everything")
    tensors = load_file(folder / "planned.safetensors")
    del tensors[lost]
    save_file(tensors, folder / "planned.safetensors", {"format": "pt"})
    assert said(folder) == f"the folder lacks the tensor {lost}; write it anew ({code})"


def test_a_tensor_that_no_slot_has(tmp_path: Path) -> None:
    folder = damaged(tmp_path, "dropped")
    tensors = load_file(folder / "planned.safetensors")
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(128)
    save_file(tensors, folder / "planned.safetensors", {"format": "pt"})
    assert said(folder).endswith("which no slot has; write it anew (W306)")


def test_a_tensor_that_two_files_hold(tmp_path: Path) -> None:
    folder = damaged(tmp_path, "dropped")
    tensors = load_file(folder / "planned.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "more.safetensors", {"format": "pt"})
    assert "twice" in said(folder)
