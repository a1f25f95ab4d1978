"""Names of measures, searches, methods, transforms, exchange formats: the file name is the public name.

`measures/block_influence.py` defines the function `block_influence`, known as `block-influence`. Its keyword-only
parameters that the harness does not fill are its options. Listing reads the source as text, so that `shoal ls` imports
neither torch nor transformers. Other packages add entries through the entry point groups `shoal.measures`, ..., and
where one name is asked for, that of a Python file does as well: `./mine.py` (`shoal.user_files`).
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal

from shoal.errors import UsageError
from shoal.user_files import UserFile, docstring, imported, is_file, read_user_file, require_call

Kind = Literal[
    "measures",
    "search",
    "methods",
    "transforms",
    "recipes",
    "terms",
    "learners",
    "policies",
    "exchange",
    "drafts",
    "caches",
    "graphs",
]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)

_ONE: dict[Kind, str] = {
    "measures": "measure",
    "search": "search",
    "methods": "method",
    "transforms": "transform",
    "recipes": "recipe",
    "terms": "term",
    "learners": "learner",
    "policies": "policy",
    "exchange": "format",
    "drafts": "draft",
    "caches": "KV cache",
    "graphs": "graph",
}

_HOMES: dict[Kind, str] = {
    "policies": "shoal.deciding.policies",
    "drafts": "shoal.speculating.drafts",
    "terms": "shoal.healing.terms",
    "learners": "shoal.healing.learners",
    "caches": "shoal.compressing.caches",
}
"""Where the files of a kind are, for those that are not in a room of that name."""

_CALLS: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "measures": (("model", "data"), ("stack", "batch", "progress")),
    "methods": (("task",), ()),
    "transforms": (("job",), ()),
    "recipes": ((), ()),
    "terms": (("seen",), ()),
    "learners": (("job",), ()),
    "policies": (("plan", "spec"), ()),
    "exchange": ((), ()),
    "drafts": ((), ("spec",)),
    "caches": (("job",), ()),
    "graphs": (("model",), ()),
}
"""Positional values and keywords with which the function of a kind is called; searches differ."""

HARNESS = frozenset(
    {
        "batch",
        "budget",
        "data",
        "drop",
        "legal",
        "maps",
        "model",
        "objective",
        "plan",
        "progress",
        "scores",
        "seed",
        "spec",
    }
    | {"job", "seen", "stack", "task", "tokenizer"}
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
    file: UserFile | None = None
    """The user's own file in which it is, if it is in one; `name` is then the file's name as typed."""

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        paragraph = " ".join(self.doc.split("\n\n")[0].split())
        return re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0]

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        return getattr(importlib.import_module(self.module), self.attribute)

    def says(self, name: Literal["READS_DATA", "NEEDS_PLAN", "SEARCHES", "REMOVES"]) -> bool:
        """What its file says of it. READS_DATA (without a word True): a method looks at text. NEEDS_PLAN (True): a
        transform stands in for what a plan removes. SEARCHES (False): a method evaluates many plans and takes its time.
        REMOVES (True): a method or search removes something, and takes an amount."""
        return bool(getattr(importlib.import_module(self.module), name, name != "SEARCHES"))

    reads_data = property(lambda self: self.says("READS_DATA"))
    needs_plan = property(lambda self: self.says("NEEDS_PLAN"))
    searches = property(lambda self: self.says("SEARCHES"))
    removes = property(lambda self: self.says("REMOVES"))

    @property
    def examples(self) -> Any:
        """What its file says that it is tried with (`shoal.examples`); None when it says nothing."""
        return getattr(importlib.import_module(self.module), "EXAMPLES", None)

    def options(self) -> dict[str, inspect.Parameter]:
        """Its own options, annotations evaluated: keyword-only parameters that the harness does not fill."""
        function = self.load()
        own = {
            name: parameter
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in HARNESS
        }
        # the harness's own types are imported for type checkers only, so the whole signature cannot be evaluated
        asked = SimpleNamespace(__annotations__={name: parameter.annotation for name, parameter in own.items()})
        types = typing.get_type_hints(asked, globalns=inspect.unwrap(function).__globals__)
        return {name: parameter.replace(annotation=types[name]) for name, parameter in own.items()}

    def parse(self, pairs: Sequence[str], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """["key=value", ...] -> typed options, beside those of `given`. Raises U502 naming the option, its type and the
        nearest name, and for an option that is missing."""
        return self.accept({**(given or {}), **self.typed(pairs)})

    def typed(self, pairs: Sequence[str]) -> dict[str, Any]:
        """["key=value", ...] -> typed options, which need not be all that the entry needs. Raises U502."""
        known, parsed = self.options(), {}
        for pair in pairs:
            key, separator, text = pair.partition("=")
            key = self._known(key.strip().replace("-", "_"), known)
            if not separator:
                raise UsageError(f"{self.name}: the option {key} has no value; write {key}=VALUE", code="U502")
            parsed[key] = _convert(f"{self.name}: {key}={text}", text.strip(), known[key].annotation)
        return parsed

    def accept(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`settings` as keyword arguments. Raises U502 for an unknown name, a word not on offer, a missing option."""
        known = self.options()
        for key, value in settings.items():
            words = typing.get_args(known[self._known(key, known)].annotation)
            if typing.get_origin(known[key].annotation) is Literal and value not in words:
                raise _refusal(f"{self.name}: {key}={value}", _one_of(words))
        missing = [n for n, p in known.items() if p.default is p.empty and n not in settings]
        if missing:
            raise UsageError(f"{self.name} needs the option {missing[0]}; write {missing[0]}=VALUE", code="U502")
        return dict(settings)

    def _known(self, key: str, known: Mapping[str, Any]) -> str:
        if key not in known:
            raise UsageError(
                f"{self.name} has no option {key!r}{_nearest(key, known)}; "
                f"it has {', '.join(known) or 'none'} (written as name=value)",
                code="U502",
            )
        return key


def home_of(kind: Kind) -> str:
    """The package that holds the entries of one kind."""
    return _HOMES.get(kind, f"shoal.{kind}")


def entries(kind: Kind) -> dict[str, Entry]:
    """All entries of one kind by public name, in alphabetical order."""
    home = home_of(kind)
    spec = importlib.util.find_spec(home)
    assert spec is not None
    found: dict[str, Entry] = {}
    for place in spec.submodule_search_locations or ():
        for file in sorted(Path(place).glob("[!_]*.py")):
            name = file.stem.replace("_", "-")
            found[name] = Entry(kind, name, f"{home}.{file.stem}", file.stem, _docstring(file))
    for point in entry_points(group=f"shoal.{kind}"):
        found.setdefault(point.name, Entry(kind, point.name, point.module, point.attr, f"From {point.value}."))
    return dict(sorted(found.items()))


def get(kind: Kind, name: str) -> Entry:
    """The entry with this public name, or the function in the Python file of this name.

    Raises U501 with the nearest name; U516 to U519 for a file that cannot be used.
    """
    if is_file(name.strip()):
        return _in_file(kind, name.strip())
    found = entries(kind)
    wanted = name.replace("_", "-")
    if wanted not in found:
        what = _ONE[kind]
        raise UsageError(f"there is no {what} {name!r}{_nearest(wanted, found)}; see shoal ls {kind}", code="U501")
    return found[wanted]


def _in_file(kind: Kind, name: str) -> Entry:
    file = read_user_file(name)
    doc = docstring(file)
    imported(file)
    if kind in _CALLS:
        require_call(file, _ONE[kind], *_CALLS[kind])
    return Entry(kind, name, file.module, file.function, doc, file)


def _docstring(file: Path) -> str:
    return _read_docstring(file, file.stat().st_mtime_ns)


@functools.cache  # of the version with this time: a search asks for its entries again and again
def _read_docstring(file: Path, changed: int) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == file.stem]
    return (ast.get_docstring(functions[0]) if functions else None) or ast.get_docstring(tree) or ""


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _convert(what: str, text: str, kind: Any) -> Any:
    """`text` as a value of the type `kind`. Raises U502: "`what` is not ..."."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return _first_of(what, text, inner)
    if origin is Literal:
        words = {str(word): word for word in inner}
        if text not in words:
            raise _refusal(what, _one_of(inner))
        return words[text]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise _refusal(what, "true or false")
        return text.lower() == "true"
    if origin in (tuple, list):
        return origin(_convert(what, piece.strip(), inner[0]) for piece in text.split(","))
    try:
        return kind(text)
    except (TypeError, ValueError):
        raise _refusal(what, f"of type {getattr(kind, '__name__', kind)}") from None


def _first_of(what: str, text: str, kinds: tuple[Any, ...]) -> Any:
    """The first type of a union that takes `text`; "none" is None where that is allowed."""
    if NoneType in kinds and text.lower() == "none":
        return None
    tried = [kind for kind in kinds if kind is not NoneType]
    for kind in tried[:-1]:
        with suppress(UsageError):
            return _convert(what, text, kind)
    return _convert(what, text, tried[-1])


def _one_of(words: tuple[Any, ...]) -> str:
    return f"one of {', '.join(map(str, words))}"


def _refusal(what: str, expected: str) -> UsageError:
    return UsageError(f"{what} is not {expected}", code="U502")
