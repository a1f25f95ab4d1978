"""The text of one source as token ids, read no further than needed."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from shoal.data.document import Document, Opened, moved
from shoal.errors import DataError

CHARS_PER_TOKEN = 6
# The end of a cut text may be tokenised otherwise than its middle; this many tokens before the cut are not trusted.
MARGIN = 256


@dataclass(frozen=True, slots=True)
class Tokens:
    """What was read of a source."""

    ids: list[int]
    answers: list[bool] | None
    """Which of them an assistant wrote; None where the text or the tokenizer does not tell."""


def tokenise(source: Opened, tokenizer: Any, wanted: int | None) -> Tokens:
    """At least the first `wanted` token ids of the whole text (all of them for None), reading no more than needed.

    The text is never tokenised in pieces, because tokenizers without a pre-tokenizer merge across any cut: of a longer
    text a beginning is tokenised, whose last tokens are not used. Raises D404 for a source without text.
    """
    read = _Read()
    chars = 0 if wanted is None else (wanted + MARGIN) * CHARS_PER_TOKEN
    for piece in source.pieces:
        read.add(piece)
        while wanted is not None and read.size >= chars:
            tokens = _encoded(read.text[:chars], read.spans, tokenizer)
            if len(tokens.ids) >= wanted + MARGIN:
                return Tokens(tokens.ids[:wanted], None if tokens.answers is None else tokens.answers[:wanted])
            chars *= 2
    if not read.text.strip():
        raise DataError(f"{source.name} holds no text; name another source", code="D404")
    return _encoded(read.text, read.spans, tokenizer)


class _Read:
    """The text so far, with the answers in it."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: list[str] = []
        self._spans: list[tuple[int, int]] = []
        self._told = True

    def add(self, piece: Document) -> None:
        self._told = self._told and piece.answers is not None
        self._spans += moved(piece.answers, self.size) or ()
        self._parts.append(piece.text)
        self.size += len(piece.text)

    @property
    def text(self) -> str:
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    @property
    def spans(self) -> list[tuple[int, int]] | None:
        """Of the answers; None when one piece does not tell."""
        return self._spans if self._told else None


def _encoded(text: str, spans: list[tuple[int, int]] | None, tokenizer: Any) -> Tokens:
    # verbose=False: the text is longer than the model's context on purpose, and no window will be.
    options = {"add_special_tokens": False, "verbose": False}
    if spans is None or not getattr(tokenizer, "is_fast", False):
        return Tokens(list(tokenizer(text, **options)["input_ids"]), None)
    found = tokenizer(text, return_offsets_mapping=True, **options)
    return Tokens(list(found["input_ids"]), _marked(found["offset_mapping"], spans))


def _marked(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """For each token whether it begins inside of a span."""
    starts = [first for first, _ in spans]
    return [(at := bisect_right(starts, first)) > 0 and first < spans[at - 1][1] for first, _ in offsets]
