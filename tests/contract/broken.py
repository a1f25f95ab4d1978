"""Sound folders, and the ways in which other tools break them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from shoal.cli import app
from shoal.models.load import inspect_source
from shoal.models.shards import INDEX
from shoal.plan import Plan, parse_plan
from shoal.writing.stream import stream

from .families import tiny

KEPT = (0, 2, 3)
Tensors = dict[str, torch.Tensor]
Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(the base with its 4 layers, the sound folder of its layers 0, 2 and 3) of a family."""
    root = tmp_path_factory.mktemp("folders")

    def made(family: str) -> tuple[Path, Path]:
        base, sound = root / f"{family}-base", root / family
        if not sound.exists():
            tiny(family, "eager").save_pretrained(base, max_shard_size="60KB")
            plan = parse_plan("0,2-3", Plan.identity(inspect_source(base)))
            stream(base, plan, sound, shard_size="20KB")
        return base, sound

    return made


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def set_config(folder: Path, **fields: Any) -> None:
    """None takes a field away."""
    new = {name: value for name, value in (config_of(folder) | fields).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(new), encoding="utf-8")


def stale(*names: str) -> Break:
    """The fields as they are in the base, from the folder beside."""

    def change(folder: Path) -> None:
        base = config_of(folder.parent / "base")
        set_config(folder, **{name: base[name] for name in names})

    return change


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def saved(folder: Path, change: Callable[[Tensors], object]) -> None:
    """The tensors, changed, in one file without an index."""
    tensors = tensors_of(folder)
    made = change(tensors)
    for file in (*folder.glob("*.safetensors"), *folder.glob(INDEX)):
        file.unlink()
    save_file(made if isinstance(made, dict) else tensors, folder / "model.safetensors", metadata={"format": "pt"})


def numbered(folder: Path) -> None:
    """The layers with the numbers of the base, as plain deletion leaves them."""

    def old(tensors: Tensors) -> Tensors:
        return {
            re.sub(r"(layers|h)\.(\d+)\.", lambda m: f"{m[1]}.{KEPT[int(m[2])]}.", n, count=1): t
            for n, t in tensors.items()
        }

    saved(folder, old)


def no_note(folder: Path) -> None:
    set_config(folder, shoal=None)


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def all_of(*breaks: Break) -> Break:
    return lambda folder: [change(folder) for change in breaks]


UP = "model.layers.1.mlp.up_proj.weight"
WHOLE = ("num_hidden_layers", "layer_types")


def shoal(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(words), prog_name="shoal")
    assert result.exit_code == code, f"{result.output}{result.exception!r}"
    return result.stderr if code else result.stdout
