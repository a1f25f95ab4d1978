"""Every public name: of Python, of the command line, of the registry, of errors, and what the docs import."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

import shoal
from shoal.cli import app
from shoal.registry import KINDS, entries

ROOT = Path(__file__).resolve().parents[2]
_IMPORT = re.compile(r"^\s*from (shoal[\w.]*) import ([\w, ]+)$", re.MULTILINE)


def names() -> dict[str, Any]:
    """Public names as plain data, each group sorted."""
    return {
        "python": sorted(shoal.__all__),
        "plan": sorted(import_module("shoal.plan").__all__),
        "documented": sorted(documented()),
        "verbs": verbs(),
        "registered": {kind: {name: options(entry) for name, entry in entries(kind).items()} for kind in KINDS},
        "codes": codes(),
    }


def verbs() -> dict[str, dict[str, list[str]]]:
    """For each verb its parameters: the key of a config file, and what is typed (nothing for an argument)."""
    group: Any = typer.main.get_command(app)
    return {
        name: {str(p.name): sorted([*p.opts, *p.secondary_opts]) for p in verb.params}
        for name, verb in sorted(group.commands.items())
    }


def options(entry: Any) -> dict[str, str]:
    """Each option of a registered function with its default as text."""
    return {name: str(parameter.default) for name, parameter in entry.options().items()}


def codes() -> list[str]:
    """Every code of the page of error codes."""
    page = (ROOT / "docs" / "error-codes.md").read_text(encoding="utf-8")
    return sorted(set(re.findall(r"^\| ([NPWMDU]\d{3}) \|", page, re.MULTILINE)))


def documented() -> set[str]:
    """MODULE:NAME for each name that README.md or a page of docs/ imports."""
    found = set()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for module, imported in _IMPORT.findall(page.read_text(encoding="utf-8")):
            found |= {f"{module}:{name.strip()}" for name in imported.split(",")}
    return found
