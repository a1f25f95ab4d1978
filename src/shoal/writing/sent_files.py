"""The files of a folder as they leave this machine: Shoal's own records without its paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ModelError, WriteError
from shoal.models.adapter import CONFIG as ADAPTER
from shoal.models.checkpoint import read_json
from shoal.writing.card import card_data
from shoal.writing.local_paths import local_paths, own_roots, shortened

_PAGES = ("report.html", "results.md", "cells.jsonl")
_CONFIGS = ("config.json", ADAPTER)
_VOCABULARIES = ("tokenizer.json", "vocab.json")
_TEXTS = (".json", ".jsonl", ".yaml", ".html", ".md")
_MAX_TEXT = 50_000_000
"""Bytes of a text that is looked through; a larger one is none of Shoal's."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A file as it will be sent."""

    name: str
    """Its path in the folder and in the repository, with slashes."""
    path: Path
    size: int
    """Bytes that are sent."""
    content: bytes | None = None
    """In place of what the file holds: the same without paths of this machine."""


@dataclass(frozen=True, slots=True)
class Base:
    """The base of what is sent."""

    path: Path | None
    """Where it lies on this machine, as plan or adapter say; None for a Hub id and where none is named."""
    name: str | None
    """What is sent in its place: its Hub id."""


def base_of(place: Path, hub_id: str | None) -> Base:
    """The base that the plan or the adapter of a folder names, and its Hub id: `hub_id`, or what the card says."""
    named = [_named(place / name, keys) for name, keys in _WHERE]
    path = next((Path(one) for one in named if isinstance(one, str) and Path(one).is_absolute()), None)
    known = card_data(place / "README.md").get("base_model")
    return Base(path, hub_id or (known if isinstance(known, str) else None))


_WHERE = (
    (ADAPTER, ("base_model_name_or_path",)),
    ("shoal/plan.json", ("base", "source")),
    ("config.json", ("plan", "base", "source")),
)
"""Which files say where the base lies, and under which keys."""


def _named(file: Path, keys: tuple[str, ...]) -> Any:
    try:
        found: Any = read_json(file)
    except ModelError:  # it is not there, and what must be there has been read before
        return None
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def sent(place: Path, name: str, repo: str, base: Base) -> Sent:
    """The file `name` of the folder `place` as it is sent to `repo`. Raises W313 for a card or a config in which a path
    of this machine stands that is neither the folder's own nor the base's."""
    path, last = place / name, Path(name).name
    plain = Sent(name, path, path.stat().st_size)
    ours = name.startswith("shoal/") or last in _CONFIGS or name in _PAGES
    face = last == "README.md" or (path.suffix == ".json" and last not in _VOCABULARIES)
    if plain.size > _MAX_TEXT or path.suffix not in _TEXTS or not (ours or face):
        return plain
    text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    clean = text
    if ours:
        if base.path is not None and base.name is not None:
            clean = clean.replace(base.path.as_posix(), base.name)
        clean = shortened(clean, place, repo)
    roots = own_roots(place, place.parent, *([] if base.path is None else [base.path]))
    if face and (left := next(local_paths(clean, roots), None)) is not None:
        raise WriteError(
            f"{name} of {place.name} names {left}, a path of this machine; take it out of the file, then push again",
            code="W313",
        )
    if clean == text:
        return plain
    content = clean.encode("utf-8", errors="surrogateescape")
    return Sent(name, path, len(content), content)
