"""Broken and unusual things that a verb may be given, by the place where they stand in a command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONG = "x" * 5000
Make = Callable[[Path, dict[str, str]], str]
"""(an empty folder of its own, sound inputs by name) -> what to type."""


def _file(name: str, content: bytes) -> Make:
    def make(place: Path, _: dict[str, str]) -> str:
        (place / name).write_bytes(content)
        return str(place / name)

    return make


def _model(change: Callable[[Path], Any]) -> Make:
    """The sound model's folder, changed."""

    def make(place: Path, sound: dict[str, str]) -> str:
        shutil.copytree(sound["MODEL"], place / "model")
        change(place / "model")
        return str(place / "model")

    return make


def _config(**fields: Any) -> Make:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields), encoding="utf-8")

    return _model(change)


def _folder(place: Path, _: dict[str, str]) -> str:
    (place / "folder").mkdir()
    return str(place / "folder")


def _weights(change: Callable[[bytes], bytes]) -> Make:
    def cut(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return _model(cut)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


def _link(place: Path, _: dict[str, str]) -> str:
    (place / "link").symlink_to(place / "nowhere")
    return str(place / "link")


def _as(name: str) -> Make:
    return lambda _, sound: sound[name]


def _typed(text: str) -> Make:
    return lambda *_: text


NUL, NAME = "a NUL in the name", "a very long name"

MODELS: dict[str, Make] = {
    "an empty folder": _folder,
    "a text file": _file("model.txt", b"this is no model\n"),
    "no such path": lambda place, _: str(place / "nowhere"),
    "no such hub id": _typed("nobody/nothing"),
    "an empty name": _typed(""),
    NUL: _typed("model\0name"),
    NAME: _typed(LONG),
    "a long name in a folder": lambda place, _: str(place / LONG),
    "a home of nobody": _typed("~nobody-of-this-name/model"),
    "a link to nothing": _link,
    "truncated safetensors": _weights(lambda data: data[:-100]),
    "safetensors of noise": _weights(lambda data: b"\xff" * len(data)),
    "empty safetensors": _weights(lambda _: b""),
    "pickled weights": _model(_pickled),
    "no weights": _model(lambda folder: (folder / "model.safetensors").unlink()),
    "no config": _model(lambda folder: (folder / "config.json").unlink()),
    "a config that is no JSON": _model(lambda folder: (folder / "config.json").write_text("{")),
    "a config that is a list": _model(lambda folder: (folder / "config.json").write_text("[1]")),
    "an unknown model_type": _config(model_type="frobnicator", architectures=["Frobnicator"]),
    "no model_type": _config(model_type=None, architectures=None),
    "a config of odd types": _config(hidden_size="wide", num_attention_heads=0),
    "a truncated gguf": _file("cut.gguf", b"GGUF\x03\x00\x00\x00\xff\xff"),
    "a gguf of text": _file("text.gguf", b"this is no model\n"),
    "a folder called gguf": lambda place, _: str((place / "folder.gguf").mkdir() or place / "folder.gguf"),
}
"""None of them is a model: every verb refuses it by code."""

UNUSUAL: dict[str, Make] = {
    "no tokenizer": _as("BARE"),
    "one layer": _as("ONE"),
    "a gguf file": _as("GGUF"),
}
"""Models all the same: a verb works or refuses by code."""

DATA: dict[str, Make] = {
    "no such file": lambda place, _: str(place / "nowhere.txt"),
    "an empty file": _file("empty.txt", b""),
    "blanks": _file("blank.txt", b" \n \n"),
    "a few words": _file("short.txt", b"too short"),
    "binary data": _file("binary.txt", bytes(range(256)) * 40),
    "NULs": _file("nul.txt", b"text\0text" * 400),
    "a folder": _folder,
    "a broken jsonl": _file("broken.jsonl", b'{"text": "a"}\n{"text": \n'),
    "a jsonl of numbers": _file("numbers.jsonl", b"1\n2\n3\n"),
    "a jsonl without text": _file("other.jsonl", b'{"body": "a"}\n'),
    "a parquet file of text": _file("text.parquet", b"this is no parquet file"),
    "an empty name": _typed(""),
    NUL: _typed("data\0.txt"),
    NAME: _typed(f"{LONG}.txt"),
}
"""Nothing to read."""

PLANS: dict[str, Make] = {
    "a text file": _file("plan.txt", b"0-2\n"),
    "no such json": lambda place, _: str(place / "nowhere.json"),
    "a json of text": _file("plan.json", b"0-2"),
    "a json of noise": _file("noise.json", b"\xff\x00\xfe"),
    "a json of another kind": _file("other.json", b'{"format": "other"}'),
    "a folder without a plan": _folder,
    "nothing": _typed(""),
    "half a span": _typed("0-"),
    "a huge layer": _typed("0-99999999999999"),
    "a huge repeat": _typed("0x99999999999"),
    "a stack that is not there": _typed("encoder: 0"),
    "stacks without end": _typed("decoder: 0;" * 3),
    "brackets": _typed("(" * 3000),
    NUL: _typed("0\0-2"),
    NAME: _typed(f"{LONG}.json"),
}
"""No plan of the model."""

OUTPUTS: dict[str, Make] = {
    "a folder of other things": lambda place, _: str(_photos(place)),
    "a file": _file("taken", b"mine"),
    "under a file": lambda place, sound: _file("file", b"mine")(place, sound) + "/out",
    "in no folder": lambda place, _: str(place / "no" / "such" / "out"),
    "where nobody may write": _typed("/proc/out"),
    "an empty name": _typed(""),
    "the model itself": _as("MODEL"),
    NUL: _typed("out\0put"),
    NAME: lambda place, _: str(place / LONG),
}
"""No place for an output."""


def _photos(place: Path) -> Path:
    folder = place / "photos"
    folder.mkdir()
    (folder / "one.png").write_bytes(b"mine")
    return folder
