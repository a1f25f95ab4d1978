"""How text is named: a source, a key of its rows, and weights of several sources.

    data   := source | part ("," part)*
    part   := source "=" WEIGHT
    source := "builtin" | FILE | FILE ":" KEY | HUB_ID

A comma begins a new part only behind `=WEIGHT`, so that file names may hold commas. A file that is there wins: `a:b=1`
is a file where one of that name exists. The last colon parts a key from its file, as `text` in `C:\\a.jsonl:text`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.errors import DataError, UsageError

BUILTIN = "builtin"
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Files of rows with keys, as far as their names tell."""
PACKED = (".gz", ".bz2", ".xz", ".zst")
HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.\[\]%-]+))?")
_FILES = (*ROWS, ".txt", ".md", ".rst", ".text", ".log")
_WEIGHT = re.compile(r"=\s*([^=,:/\\]*?)\s*(?:,|$)")


@dataclass(frozen=True, slots=True)
class Part:
    """One source of text."""

    name: str
    """`builtin`, a file or a hub id."""
    key: str | None = None
    """Of a file's rows."""
    weight: float | None = None
    """The share of the windows, beside the other parts' weights; None for a source alone."""

    @property
    def file(self) -> Path | None:
        """The file; None for the built-in text and a hub id."""
        return path_of(self.name) if self.name != BUILTIN and not is_hub_id(self.name) else None

    @property
    def has_rows(self) -> bool:
        """Whether there are keys to choose from."""
        return self.name != BUILTIN and (self.file is None or suffix_of(self.file) in ROWS)

    def spelled(self, name: str | None = None) -> str:
        """The part as it is typed, with another `name` if one is given."""
        key = "" if self.key is None else f":{self.key}"
        weight = "" if self.weight is None else f"={self.weight:g}"
        return f"{self.name if name is None else name}{key}{weight}"


@dataclass(frozen=True, slots=True)
class TextSource:
    """What was typed, with what else is asked of its rows; `shoal.load_data` takes it."""

    text: str
    key: str | None = None
    """Of the rows of every part that names none."""
    chat_template: str | None = None
    """See `shoal.load_data`."""
    may_be_text: bool = False
    """Whether plain text is right too, for which the chat template has nothing to write."""

    def __str__(self) -> str:
        return self.text


def read(text: str) -> tuple[Part, ...]:
    """The parts of a spelling. Raises D490 for weights that are no numbers above 0, or that only some parts have."""
    if is_there(path_of(text)) or not any(_number(found[1]) is not None for found in _WEIGHT.finditer(text)):
        return (_source(text),)
    pieces, rest = list[Part](), text
    while rest.strip():
        found = _WEIGHT.search(rest)
        if found is None or not rest[: found.start()].strip():
            raise DataError(
                f"the data {text!r} gives some parts a weight and {rest.strip()!r} none; write each as SOURCE=WEIGHT, "
                "as in a.jsonl=0.7,b.txt=0.3",
                code="D490",
            )
        pieces.append(replace(_source(rest[: found.start()].strip()), weight=_weight(found[1], text)))
        rest = rest[found.end() :]
    return tuple(pieces)


def keyed(text: str, key: str | None, chat_template: str | None = None) -> str | TextSource:
    """What was typed with `--text-key` and `--chat-template`. Raises U670 where no part has rows to use them on."""
    if key is None and chat_template is None:
        return text
    if not any(part.has_rows for part in read(text)):
        option = "--text-key" if key is not None else "--chat-template"
        raise UsageError(f"{option} is for rows of a file or data set, and {text} has none; leave it out", code="U670")
    return TextSource(text, key, chat_template)


def templated(text: str, chat_template: str | None) -> str | TextSource:
    """What was typed as a second source, for which a chat template counts where it has rows."""
    if chat_template is None or not any(part.has_rows for part in read(text)):
        return text
    return TextSource(text, None, chat_template, may_be_text=True)


def spelled(text: str, name: Callable[[Part], str], key: str | None = None) -> str:
    """The same data with the names of its parts exchanged, and with `key` where a part with rows has none."""
    found = read(text)
    parts = [replace(one, key=key) if key and one.key is None and one.has_rows else one for one in found]
    return ",".join(one.spelled(name(one)) for one in parts)


def located(text: str, key: str | None = None) -> str:
    """The same data with its files by their full path, so that it is found from another folder too."""
    return spelled(text, lambda one: str(one.file.resolve()) if one.file and is_there(one.file) else one.name, key)


def short(text: str, parts: int = 1) -> str:
    """The same data with the last `parts` of each file's path and each data set's name; 1 leaves folders and owners
    out."""
    return spelled(text, lambda one: Path(*(one.file or Path(one.name)).parts[-parts:]).as_posix())


def told_apart(texts: Iterable[str], short: Callable[[str, int], str] = short) -> dict[str, str]:
    """{text: name}. A name is `short(text, parts)` with as few parts as no other text shares."""
    each, found = list(dict.fromkeys(texts)), dict[str, str]()
    most = max((len(Path(text).parts) for text in each), default=1)
    for text in each:
        others, name = [other for other in each if other != text], text
        for parts in range(1, most + 1):
            name = short(text, parts)
            if all(short(other, parts) != name for other in others):
                break
        found[text] = name
    return found


def is_hub_id(name: str) -> bool:
    """Whether a name that no file has can be a data set's on the hub."""
    head = name.partition(":")[0]
    return bool(HUB_ID.fullmatch(name)) and not is_there(Path(name)) and suffix_of(Path(head)) not in _FILES


def path_of(name: str) -> Path:
    """The path of a name, in whose front `~` is the home folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # no home of that user
        return Path(name)


def is_there(path: Path) -> bool:
    """Whether there is a file or folder; what cannot be a path is none."""
    try:
        return path.exists()
    except OSError:
        return False


def suffix_of(path: Path) -> str:
    """The suffix that says what is in a file, behind which one of `PACKED` may stand."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in PACKED else suffix


def _source(text: str) -> Part:
    """A source, with its key where what stands before the last colon is a file, or looks like one."""
    head, colon, key = text.rpartition(":")
    if not colon or text == BUILTIN or is_there(path_of(text)):
        return Part(text)
    there = is_there(path_of(head)) and path_of(head).is_file()
    named = suffix_of(Path(head)) in _FILES and not re.search(r"[\\/]", key)
    if not (there or named):
        return Part(text)
    if not key.strip():
        raise DataError(f"{text!r} names no key behind its colon; write {head}:KEY or {head}", code="D408")
    return Part(head, key)


def _weight(text: str, whole: str) -> float:
    weight = _number(text)
    if weight is None or not (math.isfinite(weight) and weight > 0):
        raise DataError(
            f"the weight {text!r} in the data {whole!r} is no number above 0; write a.jsonl=0.7,b.txt=0.3", code="D490"
        )
    return weight


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
