"""`NAME:key=value,key=value`: an entry of the registry with its options, as a person types it.

One grammar for policies, methods, transforms, measures and drafts:

    entry   := NAME | NAME ":" VALUE | NAME ":" (VALUE ("," | ";"))? option (("," | ";") option)*
    option  := KEY "=" VALUE

A comma or semicolon begins a new option only in front of `KEY=`; any other belongs to the value, as in
`skip:listed=3-5,7`. So may `:`, `+` and `=`, as in `calibrated:at=14:0.97+20:0.8`. A lone VALUE is that of the entry's
first option where the kind of entry allows it (drafts: `exit:8`). Drafts join two entries by `+` (`lookup+exit:8`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from shoal.errors import UsageError
from shoal.registry import Entry, Kind, get

_KEY = r"\s*[^\W\d][\w-]*\s*="
"""The beginning of an option. A name begins with a letter, so `2=1` belongs to a value: a plan ties layers so."""
_NEXT = re.compile(rf"[,;](?={_KEY})")
_FIRST = re.compile(rf"{_KEY}|=")
_AROUND = re.compile(r"^[\s,;]+|[\s,;]+$")


@dataclass(frozen=True)
class Spelled:
    """What was typed; nothing is looked up yet."""

    name: str
    options: tuple[tuple[str, str], ...] = ()
    lone: str = ""
    """The value that stands alone behind the colon."""

    def __str__(self) -> str:
        return ":".join([self.name, *([",".join(self.pairs)] if self.pairs else [])])

    @property
    def pairs(self) -> list[str]:
        """Each option as `Entry.parse` takes it."""
        return [*([self.lone] if self.lone else []), *(f"{key}={value}" for key, value in self.options)]

    def having(self, **options: object) -> Spelled:
        """The same with more options; of two of one name the later counts."""
        return replace(self, options=(*self.options, *((key, str(value)) for key, value in options.items())))


def read(text: str) -> Spelled:
    """Take a text apart; `str` puts it together again. Raises U502 for a colon with nothing behind it."""
    name, colon, rest = text.partition(":")
    name, rest = name.strip(), _AROUND.sub("", rest)
    if colon and not rest:
        raise UsageError(f"{text!r} gives no option; write {name} or {name}:key=value", code="U502")
    if not (_FIRST.match(rest) or _NEXT.search(rest)):
        return Spelled(name, lone=rest)
    pieces = [_AROUND.sub("", piece) for piece in _NEXT.split(rest)]
    lone = "" if _FIRST.match(rest) else pieces.pop(0)
    pairs = [piece.partition("=") for piece in pieces]
    return Spelled(name, tuple((key.strip(), value.strip()) for key, _, value in pairs), lone)


def chosen(
    kind: Kind, text: str, given: Mapping[str, Any] | None = None, *, lone: bool = False
) -> tuple[Entry, dict[str, Any]]:
    """The entry of a text, and its options with their types: those of the text and the `given` ones, of two of one name
    that of the text. `lone`: a value without a name is the first option's.

    Raises U501 for a name and U502 for an option that does not exist.
    """
    spelled = read(text)
    entry = get(kind, spelled.name)
    return entry, options_of(entry, spelled, given, lone=lone)


def options_of(
    entry: Entry, spelled: Spelled, given: Mapping[str, Any] | None = None, *, lone: bool = False
) -> dict[str, Any]:
    """What `entry` makes of the options that were typed. Raises U502."""
    first = next(iter(entry.options()), None)
    if lone and spelled.lone and first is not None:
        spelled = replace(spelled, options=((first, spelled.lone), *spelled.options), lone="")
    return entry.parse(spelled.pairs, given)
