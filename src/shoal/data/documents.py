"""From rows to documents: plain text under a key, conversations, or a prompt with its response."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from shoal.data.chat import Chat, Message, messages_of, written
from shoal.data.document import Document, Opened, joined
from shoal.data.rows import Row
from shoal.errors import DataError

TEXT = "text"
CHATS = ("messages", "conversations", "conversation")
PROMPTS = ("instruction", "prompt", "question", "query", "problem", "input")
RESPONSES = ("response", "completion", "output", "answer", "chosen", "solution")
SYSTEM = ("system", "system_prompt")
"""Keys that data sets use; of each list the first that a row has counts, `text` before all of them."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the rows of a source hold, as the first one shows."""

    kind: Literal["text", "chat", "pair"]
    keys: tuple[str, ...]
    """The key of a text or a conversation; those of a prompt and its response."""
    chosen: bool
    """Whether the user named the key."""


def read_documents(name: str, rows: Iterator[Row], key: str | None, chat: Chat) -> Opened:
    """The documents of a source's rows, joined.

    The first row says what all are: text under `key` (default `text`), a conversation (`CHATS`; under `key` too), or a
    prompt with a response. Conversations go through the chat template, prompts with a response too where there is
    one; else these are parted by a blank line. Raises `DataError` D408 for a key that is not there, D488 for a row of
    another shape than the first, and what `written` raises.
    """
    first = next(rows, None)
    if first is None:
        return Opened(name, iter(()), chat=True)  # whatever it would have been
    where, row = first
    shape = _shape(row, key, where)
    take, between = _reader(shape, chat)
    documents = joined((_taken(take, row, at) for at, row in chain([first], rows)), between)
    return Opened(name, documents, _said(shape, chat), chat=shape.kind != "text")


def value_of(row: Mapping[str, Any], key: str, where: str, remedy: str) -> str:
    """The text of one row under `key`. Raises `DataError` D408 naming the keys there are."""
    if key not in row:
        found = ", ".join(map(str, row)) or "none"
        raise DataError(f"{where} has no key {key!r}; its keys are: {found}; {remedy}", code="D408")
    text = row[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} holds a {type(text).__name__}, not text; {remedy}", code="D408")
    return text


REMEDY = "choose one with --text-key KEY, or as FILE:KEY"


def _shape(row: Mapping[str, Any], key: str | None, where: str) -> Shape:
    if key is not None:
        return Shape("chat" if isinstance(row.get(key), list | tuple) else "text", (key,), chosen=True)
    if TEXT in row:
        return Shape("text", (TEXT,), chosen=False)
    if (key := _chat_key(row)) is not None:
        return Shape("chat", (key,), chosen=False)
    if (pair := _pair_keys(row)) is not None:
        return Shape("pair", pair, chosen=False)
    value_of(row, TEXT, where, REMEDY)
    raise AssertionError("a row without text was read")


def _chat_key(row: Mapping[str, Any]) -> str | None:
    return next((name for name in CHATS if name in row), None)


def _pair_keys(row: Mapping[str, Any]) -> tuple[str, str] | None:
    asked, answered = (next((name for name in names if name in row), None) for names in (PROMPTS, RESPONSES))
    return None if asked is None or answered is None else (asked, answered)


def _reader(shape: Shape, chat: Chat) -> tuple[Callable[[Mapping[str, Any], str], Document], str]:
    """What makes a document of a row, and what stands between two."""
    if shape.kind == "text":
        return lambda row, where: Document(_required(row, shape, where)), "\n\n"
    between = "\n\n" if chat.plain or (shape.kind == "pair" and not chat.there) else ""
    if shape.kind == "chat":
        return lambda row, where: _conversation(row, shape, where, chat), between
    return lambda row, where: _pair(row, shape, where, chat), between


def _taken(take: Callable[[Mapping[str, Any], str], Document], row: Mapping[str, Any], where: str) -> Document:
    """Raises D404 for half a UTF-16 pair, which JSON can spell and UTF-8 cannot."""
    found = take(row, where)
    try:
        found.text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where} holds half of a UTF-16 pair (\\ud800 to \\udfff), not text; mend or remove that line", code="D404"
        ) from None
    return found


def _required(row: Mapping[str, Any], shape: Shape, where: str) -> str:
    """The text of a row whose source is read as text."""
    (key,) = shape.keys
    if shape.chosen and isinstance(row.get(key), list | tuple):
        raise _mixed(row, f"holds a list under {key!r}", where)
    if not shape.chosen and key not in row and (_chat_key(row) is not None or _pair_keys(row) is not None):
        raise _mixed(row, f"has no {key!r}", where)
    return value_of(row, key, where, REMEDY)


def _require_keys(row: Mapping[str, Any], shape: Shape, where: str) -> None:
    missing = next((key for key in shape.keys if key not in row), None)
    if missing is not None:
        raise _mixed(row, f"has no {missing!r}", where)


def _mixed(row: Mapping[str, Any], what: str, where: str) -> DataError:
    """D488: a row that holds something else than the first one."""
    found = ", ".join(map(str, row)) or "none"
    return DataError(
        f"{where} {what}, unlike the rows before; its keys are: {found}; mend that row, or put rows of another shape "
        "into a file of their own",
        code="D488",
    )


def _conversation(row: Mapping[str, Any], shape: Shape, where: str, chat: Chat) -> Document:
    _require_keys(row, shape, where)
    (key,) = shape.keys
    turns = messages_of(row[key], where, key)
    system = _system(row) if turns[0]["role"] != "system" else []
    return written(chat, [*system, *turns], where, row.get("tools"))


def _pair(row: Mapping[str, Any], shape: Shape, where: str, chat: Chat) -> Document:
    _require_keys(row, shape, where)
    asked = shape.keys[0]
    if all(isinstance(row[key], list | tuple) for key in shape.keys):  # both as messages, as TRL has them
        turns = [one for key in shape.keys for one in messages_of(row[key], where, key)]
        return written(chat, turns, where, row.get("tools"))
    prompt, response = (value_of(row, key, where, "mend that row, or name a key") for key in shape.keys)
    more = row.get("input") if asked == "instruction" and row.get("input") else row.get("context")
    if asked == "instruction" and isinstance(more, str) and more.strip():
        prompt = f"{prompt}\n\n{more}"
    system = _system(row)
    if not chat.there or chat.plain:
        head = "\n\n".join([*(one["content"] for one in system), prompt, ""])
        return Document(head + response, ((len(head), len(head) + len(response)),))
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return written(chat, [*system, *turns], where)


def _system(row: Mapping[str, Any]) -> list[Message]:
    """The system message that stands beside a conversation, if one does."""
    found = next((row[key] for key in SYSTEM if isinstance(row.get(key), str) and row[key].strip()), None)
    return [] if found is None else [{"role": "system", "content": found}]


def _said(shape: Shape, chat: Chat) -> str | None:
    if shape.kind == "text":
        return f"key {shape.keys[0]}" if shape.chosen else None
    return f"{' and '.join(shape.keys)} {chat.said if chat.there else 'without a chat template'}"
