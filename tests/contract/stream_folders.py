"""Folders of tiny models in several shards, streamed and written, and what is in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.models.inspect import inspect
from shoal.models.load import inspect_source, load
from shoal.models.shards import Stored, stored_tensors
from shoal.plan import Plan, parse_plan
from shoal.writing.folder import write
from shoal.writing.stream import Streamed, stream

from .families import tiny


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model, in several shards."""
    root = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            model = tiny(family, "eager" if family in ("bloom", "mamba2") else "sdpa")
            model.save_pretrained(folder, max_shard_size="20KB")
        return folder

    return base


def plan_of(folder: Path, text: str) -> Plan:
    return parse_plan(text, Plan.identity(inspect_source(folder)))


def streamed(folder: Path, text: str, output: Path, **options: Any) -> Streamed:
    return stream(folder, plan_of(folder, text), output, **({"shard_size": "20KB"} | options))


def written(folder: Path, text: str, output: Path, **options: Any) -> Path:
    loaded = load(folder, device="cpu")
    return write(loaded, parse_plan(text, Plan.identity(inspect(loaded.model))), output, prove=False, **options).folder


def content(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (s.dtype, s.shape, bytes_of(s)) for name, s in stored_tensors(folder).items()}


def bytes_of(stored: Stored) -> bytes:
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        return file.read(stored.size)


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load(folder, device="cpu").model.state_dict()
