"""Folders that are damaged or hostile are refused before anything is written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.errors import ShoalError
from shoal.models.shards import INDEX, stored_tensors
from shoal.writing.stream import stream

from .stream_folders import bases, config_of, plan_of, streamed

__all__ = ["bases"]


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The header of the shard of one known tensor, changed as JSON or as text."""
    file = stored_tensors(folder)[UP].file
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    made = change(header)
    text = (made if isinstance(made, str) else json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rename(folder: Path, new: str) -> None:
    edit_header(folder, lambda h: h.update({new: h.pop(UP)}))
    edit_index(folder, lambda m: m.update({new: m.pop(UP)}))


def link_away(folder: Path) -> None:
    file = stored_tensors(folder)[UP].file
    away = folder.parent / "away.safetensors"
    shutil.move(file, away)
    file.symlink_to(away)


def cut(folder: Path) -> None:
    file = stored_tensors(folder)[UP].file
    file.write_bytes(file.read_bytes()[:-8])


def twice(folder: Path) -> None:
    place = stored_tensors(folder)[UP]
    other = next(s.file for s in stored_tensors(folder).values() if s.file != place.file)
    save_file(load_file(other) | {UP: torch.zeros(64, 32)}, other, metadata={"format": "pt"})


def reshape(folder: Path) -> None:
    edit_header(folder, lambda h: h[UP].update(shape=h[UP]["shape"][::-1]))


UP = "model.layers.1.mlp.up_proj.weight"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard cut short": (cut, "M309"),
    "a missing shard": (lambda d: stored_tensors(d)[UP].file.unlink(), "M309"),
    "an index that names a missing tensor": (lambda d: edit_index(d, lambda m: m.update(x=m[UP])), "M309"),
    "an index that names another file": (
        lambda d: edit_index(d, lambda m: m.update({UP: next(f for f in m.values() if f != m[UP])})),
        "M309",
    ),
    "an index that leaves the folder": (lambda d: edit_index(d, lambda m: m.update({UP: "../x.safetensors"})), "M309"),
    "an absolute path": (lambda d: edit_index(d, lambda m: m.update({UP: "/etc/passwd"})), "M309"),
    "an index without a map": (lambda d: (d / INDEX).write_text("{}"), "M309"),
    "an index of brackets": (lambda d: (d / INDEX).write_text("[" * 1_000_000), "M302"),
    "a link out of the folder": (link_away, "M309"),
    "a tensor in two files": (twice, "M309"),
    "a dtype that nobody knows": (lambda d: edit_header(d, lambda h: h[UP].update(dtype="G32")), "M309"),
    "a header of brackets": (lambda d: edit_header(d, lambda _: "[" * 100_000), "M309"),
    "a header with a tensor twice": (
        lambda d: edit_header(d, lambda h: json.dumps(h)[:-1] + f', "{UP}": {json.dumps(h[UP])}}}'),
        "M309",
    ),
    "overlapping tensors": (
        lambda d: edit_header(d, lambda h: h[UP].update(data_offsets=[0, 8192]) or h.update(z=h[UP])),
        "M309",
    ),
    "a wrong size": (lambda d: edit_header(d, lambda h: h[UP].update(shape=[1, 1])), "M309"),
    "a negative size": (lambda d: edit_header(d, lambda h: h[UP].update(shape=[-64, -32])), "M309"),
    "a shape that is turned": (reshape, "M336"),
    "a tensor of no part": (lambda d: rename(d, "model.layers.1.mlp.mystery.weight"), "M310"),
    "a tensor of a layer too many": (lambda d: rename(d, "model.layers.9.mlp.up_proj.weight"), "M313"),
    "a layer too many in the config": (lambda d: set_config(d, num_hidden_layers=5), "M313"),
    "a quantised model": (lambda d: set_config(d, quantization_config={"quant_method": "gptq", "bits": 4}), "W212"),
    "code of its own": (
        lambda d: set_config(d, model_type="evil", auto_map={"AutoConfig": "evil.Config"}),
        "M312",
    ),
    "another kind of model": (lambda d: (d / "config.json").write_text('{"model_type": "vit"}'), "M313"),
    "no config": (lambda d: (d / "config.json").unlink(), "M302"),
}


def set_config(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | fields))


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_whole(name: str, bases: Any, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(bases("llama"), base)
    plan = plan_of(base, "0,2-3")
    change, code = BAD[name]
    change(base)
    with pytest.raises(ShoalError) as caught:
        stream(base, plan, out / "model")
    assert caught.value.code == code, caught.value
    assert len(str(caught.value).splitlines()) == 1
    assert not out.exists()


def test_links_of_the_hub_s_cache_are_followed(bases: Any, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(bases("llama"), blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    made = streamed(snapshot, "0,2-3", tmp_path / "out")
    assert not any(path.is_symlink() for path in made.folder.rglob("*"))
    assert (made.folder / "generation_config.json").exists()
