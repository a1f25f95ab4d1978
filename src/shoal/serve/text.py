"""Incremental detokenization and stop strings: no broken characters, and nothing of a stop sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""

_BROKEN = "\ufffd"


class IncrementalDetokenizer:
    """Incremental detokenisation: the pieces joined are the text of all ids.

    A character may be spread over several tokens, and a tokenizer may write a token differently at the start of a
    text. So the ids since the last whole character are decoded together with those of the piece before, and what is
    new is handed out once it does not end in the middle of a character.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._behind = 0
        self._before = ""

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if len(text) <= len(self._before) or text.endswith(_BROKEN):
            return ""
        return self._hand_out(text)

    def rest(self) -> str:
        """What is left at the end: a character that was never finished, as the replacement character."""
        return self._hand_out(self._decode(self._ids))

    def _hand_out(self, text: str) -> str:
        new = text[len(self._before) :]
        self._ids = self._ids[self._behind :]  # what came with this piece stays, as the context of the next
        self._behind = len(self._ids)
        self._before = self._decode(self._ids)
        return new


class StopStrings:
    """Finds the first stop sequence in a text that comes in pieces, wherever the pieces are cut.

    Text that may be the start of a stop sequence is held back. The sequence that is complete first ends the text, as if
    it came letter by letter; of two that end together, the longer one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that is certain now; after `found` nothing more."""
        if self.found:
            return ""
        self._held += piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            text, self._held = self._held[: min(ends)[1]], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def rest(self) -> str:
        """What was held back and proved to be no stop sequence."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The most letters at the end of `text` with which `stop` begins, fewer than all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
