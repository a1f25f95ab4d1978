"""Every kind of bad input against every verb that reads folders: one clear error, nothing written, no code run."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from shoal.cli import app
from shoal.models.load import inspect_source
from shoal.models.shards import INDEX, SINGLE, stored_tensors
from shoal.plan import Plan, parse_plan
from shoal.writing.stream import stream

from .families import tiny
from .shares import pairs

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in several shards that Shoal wrote, so that `verify` has something to do."""
    root = tmp_path_factory.mktemp("sound")
    tiny("llama").save_pretrained(root / "base")
    plan = parse_plan("0-2", Plan.identity(inspect_source(root / "base")))
    yield stream(root / "base", plan, root / "sound", shard_size="20KB").folder
    assert sorted(path.name for path in root.iterdir()) == ["base", "sound"]


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")


def config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda data: data.update(fields))


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / INDEX, lambda data: change(data["weight_map"]))


def shard(folder: Path) -> Path:
    return stored_tensors(folder)[UP].file


def garbage(folder: Path) -> None:
    file = shard(folder)
    file.write_bytes(b"\xff" * file.stat().st_size)


def cut(folder: Path) -> None:
    file = shard(folder)
    file.write_bytes(file.read_bytes()[:-8])


def retensored(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = shard(folder)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def twice_in_a_header(folder: Path) -> None:
    file = shard(folder)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entry = json.dumps(json.loads(data[8 : 8 + length])[UP])
    text = data[8 : 8 + length].rstrip()[:-1] + f', "{UP}": {entry}}}'.encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def twice_in_two_files(folder: Path) -> None:
    place = stored_tensors(folder)[UP]
    other = next(s.file for s in stored_tensors(folder).values() if s.file != place.file)
    save_file(load_file(other) | {UP: torch.zeros(64, 32)}, other, metadata={"format": "pt"})


def link_away(folder: Path) -> None:
    file = shard(folder)
    away = folder.parent / "away"
    away.mkdir()
    shutil.move(file, away / "x.safetensors")
    file.symlink_to(away / "x.safetensors")


def code_of_its_own(folder: Path) -> None:
    config(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})(folder)
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')", encoding="utf-8")


def pickled(folder: Path) -> None:
    marker = str(folder.parent / "ran")
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    evil = b"cposix\nsystem\n(Vtouch " + marker.encode() + b"\ntR."
    (folder / "pytorch_model.bin").write_bytes(evil)


def brackets(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"[" * 10_000_000) and None  # type: ignore[func-returns-value]


BAD: dict[str, Callable[[Path], Any]] = {
    "a corrupted shard": garbage,
    "a shard cut short": cut,
    "a missing shard": lambda d: shard(d).unlink(),
    "an index that lies": index(lambda m: m.update({UP: next(f for f in m.values() if f != m[UP])})),
    "an index that names no tensor of the files": index(lambda m: m.update({"ghost.weight": m[UP]})),
    "a tensor twice in a header": twice_in_a_header,
    "a tensor in two files": twice_in_two_files,
    "a tensor of the wrong shape": lambda d: retensored(d, lambda t: t.update({UP: torch.zeros(32, 64)})),
    "a tensor that is missing": lambda d: (retensored(d, lambda t: t.pop(UP)), index(lambda m: m.pop(UP))(d)),
    "a config that is too deep": config(num_hidden_layers=9),
    "a config that is too shallow": config(num_hidden_layers=2),
    "a config without end": config(num_hidden_layers=10**12),
    "a config of odd types": config(hidden_size="wide", num_attention_heads=0),
    "a stale list": config(layer_types=["full_attention"] * 4, model_type="qwen3"),
    "a path out of the folder": index(lambda m: m.update({UP: "../away/x.safetensors"})),
    "an absolute path": index(lambda m: m.update({UP: "/etc/passwd"})),
    "code of its own": code_of_its_own,
    "a link out of the folder": link_away,
    "a config of brackets": brackets("config.json"),
    "an index of brackets": brackets(INDEX),
    "pickled weights": pickled,
    "no config": lambda d: (d / "config.json").unlink(),
    "weights beside an index of others": lambda d: save_file(
        load_file(shard(d)), d / SINGLE, metadata={"format": "pt"}
    ),
    "weights under another name": config(transformers_weights="other.safetensors"),
    "text that is no text": lambda d: (d / "config.json").write_bytes(b'{"model_type": "\xff\xfe"}'),
    "half a generation config": lambda d: (d / "generation_config.json").write_text("{"),
}
CODES = {
    "a tensor of the wrong shape": "M336",
    "a tensor that is missing": "M310",
    "a config that is too deep": "M313",
    "a config that is too shallow": "M313",
    "a config without end": "M332",
    "a config of odd types": "M307",
    "a stale list": "M307",
    "code of its own": "M312",
    "a config of brackets": "M302",
    "an index of brackets": "M302",
    "pickled weights": "M308",
    "no config": "M302",
    "weights beside an index of others": "M357",
    "weights under another name": "M358",
    "text that is no text": "M302",
    "half a generation config": "M302",
}
"""By bad input; the others are M309. Every verb says the same, but for the doctor, which lists all that is wrong."""

VERBS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "BAD"),
    "doctor": ("doctor", "BAD"),
    "doctor --repair": ("doctor", "BAD", "--repair", "OUT"),
    "write": ("write", "BAD", "--plan", "0,2", "--output", "OUT"),
    "write --stream": ("write", "BAD", "--plan", "0,2", "--output", "OUT", "--stream"),
    "prune": ("prune", "BAD", "--drop", "1", "--method", "position", "--no-assess", "--output", "OUT"),
    "verify": ("verify", "BAD"),
    "measure": ("measure", "BAD"),
    "generate": ("generate", "BAD", "hello"),
    "evaluate": ("evaluate", "BAD"),
    "show": ("show", "0,2", "--model", "BAD"),
    "convert": ("convert", "0,2", "--to", "shortgpt", "--model", "BAD", "--output", "OUT"),
}
MENDED = {
    "an index that lies",
    "an index that names no tensor of the files",
    "a config that is too deep",
    "a config that is too shallow",
    "a config without end",
}
"""What --repair writes a sound copy of."""


def snapshot(folder: Path) -> list[tuple[str, int]]:
    return sorted(
        (str(Path(at) / name), (Path(at) / name).lstat().st_mtime_ns)
        for at, _, names in os.walk(folder)
        for name in names
    )


PAIRS = pairs(5, BAD, VERBS, step=2)


@pytest.mark.parametrize(("bad", "verb"), PAIRS)
def test_bad_input_is_one_error(bad: str, verb: str, sound: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "bad", tmp_path / "out"
    shutil.copytree(sound, folder)
    BAD[bad](folder)
    before = snapshot(tmp_path)
    words = [{"BAD": str(folder), "OUT": str(out)}.get(word, word) for word in VERBS[verb]]
    result = CliRunner().invoke(app, words, prog_name="shoal")
    if verb == "doctor --repair" and bad in MENDED:
        assert result.exit_code == 0, result.output
        return
    assert result.exit_code == 1, f"{result.output} {result.exception!r}"
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("shoal: ")
    assert lines[0][7:11].rstrip(":").isalnum() and lines[0][11] == ":", lines[0]
    if not verb.startswith("doctor"):
        assert lines[0][7:11] == CODES.get(bad, "M309"), lines[0]
    assert len(lines[0]) < 700
    assert snapshot(tmp_path) == before


PLANS = {
    "brackets": b"[" * 3_000_000,
    "empty": b"{}",
    "bytes": b"\xff",
    "half": b'{"format": "shoal-plan/1", "base": {"family": "llama"}}',
    "number": b"9" * 5000,
}
READERS = ("show", "write", "write --stream", "verify", "convert", "doctor")


@pytest.mark.parametrize(("name", "verb"), pairs(3, PLANS, READERS))
def test_a_bad_plan_is_one_error(name: str, verb: str, sound: Path, tmp_path: Path) -> None:
    folder, plan = tmp_path / "folder", tmp_path / "plan.json"
    shutil.copytree(sound, folder)
    plan.write_bytes(PLANS[name])
    (folder / "shoal" / "plan.json").write_bytes(PLANS[name])
    words = {
        "show": ["show", str(plan)],
        "verify": ["verify", str(folder)],
        "convert": ["convert", str(plan), "--to", "shortgpt"],
        "doctor": ["doctor", str(sound), "--plan", str(plan)],
    }.get(verb) or [
        *verb.split()[:1],
        str(sound),
        "--plan",
        str(plan),
        "--output",
        str(tmp_path / "out"),
        *verb.split()[1:],
    ]
    before = snapshot(tmp_path)
    result = CliRunner().invoke(app, words, prog_name="shoal")
    assert result.exit_code == 1, f"{result.output} {result.exception!r}"
    assert result.stderr.startswith("shoal: ") and len(result.stderr.strip().splitlines()) == 1
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_a_plan_cannot_lead_out_of_anything(sound: Path, tmp_path: Path) -> None:
    """A plan's source is only read as a model: a path to another file is no model, and nothing is written there."""
    folder = tmp_path / "folder"
    shutil.copytree(sound, folder)
    edit_json(folder / "shoal" / "plan.json", lambda plan: plan["base"].update(source="../../etc/passwd"))
    result = CliRunner().invoke(app, ["verify", str(folder), "--json"], prog_name="shoal")
    assert "the base is not to be had" in json.loads(result.stdout)["against"]
