"""Text that is about to be read: documents, and which of it an assistant said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Spans = tuple[tuple[int, int], ...]
"""First character and the one behind the last, in order."""


@dataclass(frozen=True, slots=True)
class Document:
    """Text whose tokens follow those of the document before it."""

    text: str
    answers: Spans | None = None
    """The characters that an assistant wrote, its end of turn included; None where the text does not tell."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A source whose text is about to be read."""

    name: str
    """A file's name without its folders, `owner/name:config:split`, `builtin (Python 3.12)` or `list`."""
    pieces: Iterator[Document]
    """Their concatenation is the whole."""
    how: str | None = None
    """How its rows become text; None for plain text."""
    chat: bool = False
    """Whether a chat template has a say in it."""


def joined(documents: Iterable[Document], between: str = "\n\n") -> Iterator[Document]:
    """Documents with `between` in front of each but the first: a blank line is the usual protocol for perplexity on
    WikiText, and conversations of a chat template have their own ends."""
    for number, one in enumerate(documents):
        yield one if number == 0 or not between else Document(between + one.text, moved(one.answers, len(between)))


def moved(spans: Spans | None, by: int) -> Spans | None:
    """The same spans in a text that has `by` more characters in front."""
    return None if spans is None else tuple((first + by, end + by) for first, end in spans)
