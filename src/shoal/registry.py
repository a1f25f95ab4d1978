"""Names of measures, searches and methods: the file name is the public name; nothing else has to be edited.

`measures/block_influence.py` defines the function `block_influence`, known as `block-influence`. Its keyword-only
parameters that the harness does not fill are its options. Listing reads the source as text, so that `shoal ls` imports
neither torch nor transformers. Other packages add entries through the entry point groups `shoal.measures`, ...
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from shoal.errors import UsageError

Kind = Literal["measures", "search", "methods"]
KINDS: tuple[Kind, ...] = ("measures", "search", "methods")

HARNESS = frozenset(
    {"batch", "data", "drop", "legal", "model", "objective", "plan", "progress", "scores", "seed", "spec", "stack", "task"}
)
"""Parameters that the harness fills and that are therefore no options."""


@dataclass(frozen=True)
class Entry:
    """One registered function."""

    kind: Kind
    name: str
    module: str
    attribute: str
    doc: str

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        return " ".join(self.doc.split("\n\n")[0].split())

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        return getattr(importlib.import_module(self.module), self.attribute)  # type: ignore[no-any-return]

    def options(self) -> dict[str, inspect.Parameter]:
        """Its own options: keyword-only parameters that the harness does not fill."""
        parameters = inspect.signature(self.load(), eval_str=True).parameters
        return {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in HARNESS}

    def parse(self, pairs: list[str]) -> dict[str, Any]:
        """["key=value", ...] -> typed options. Raises U502 naming the option, its type and the nearest name."""
        known, parsed = self.options(), {}
        for pair in pairs:
            key, separator, text = pair.partition("=")
            key = key.strip().replace("-", "_")
            if not separator or key not in known:
                raise UsageError(
                    f"{self.name} has no option {key!r}{_nearest(key, known)}; "
                    f"it has {', '.join(known) or 'none'} (written as name=value)",
                    code="U502",
                )
            parsed[key] = _convert(self.name, key, text, known[key].annotation)
        return parsed


def entries(kind: Kind) -> dict[str, Entry]:
    """All entries of one kind by public name, in alphabetical order."""
    spec = importlib.util.find_spec(f"shoal.{kind}")
    assert spec is not None
    found: dict[str, Entry] = {}
    for place in spec.submodule_search_locations or ():
        for file in sorted(Path(place).glob("[!_]*.py")):
            name = file.stem.replace("_", "-")
            found[name] = Entry(kind, name, f"shoal.{kind}.{file.stem}", file.stem, _docstring(file))
    for point in entry_points(group=f"shoal.{kind}"):
        found.setdefault(point.name, Entry(kind, point.name, point.module, point.attr, f"From {point.value}."))
    return dict(sorted(found.items()))


def get(kind: Kind, name: str) -> Entry:
    """The entry with this public name. Raises U501 with the nearest name."""
    found = entries(kind)
    wanted = name.replace("_", "-")
    if wanted not in found:
        what = {"measures": "measure", "search": "search", "methods": "method"}[kind]
        raise UsageError(f"there is no {what} {name!r}{_nearest(wanted, found)}; see shoal ls {kind}", code="U501")
    return found[wanted]


def _docstring(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == file.stem]
    return (ast.get_docstring(functions[0]) if functions else None) or ast.get_docstring(tree) or ""


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _convert(owner: str, key: str, text: str, kind: Any) -> Any:
    def refuse(expected: str) -> UsageError:
        return UsageError(f"{owner}: {key}={text} is not {expected}", code="U502")

    if typing.get_origin(kind) is Literal:
        if text not in typing.get_args(kind):
            raise refuse(f"one of {', '.join(map(str, typing.get_args(kind)))}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise refuse("true or false")
        return text.lower() == "true"
    if typing.get_origin(kind) is tuple:
        return tuple(_convert(owner, key, piece, typing.get_args(kind)[0]) for piece in text.split(","))
    inner = [a for a in typing.get_args(kind) if a is not type(None)]
    for candidate in inner or [kind]:
        try:
            return candidate(text)
        except (TypeError, ValueError):
            continue
    raise refuse(f"of type {getattr(kind, '__name__', kind)}")
