"""Answers in OpenAI's shape: whole ones and chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The frame of one answer; `chat` chooses between the two shapes. All its parts carry one id."""

    model: str
    chat: bool
    with_usage: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}")

    def whole(self, text: str, reason: str, used: dict[str, int]) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        name = "chat.completion" if self.chat else "text_completion"
        return self._frame(name, [self._choice(said, reason)]) | {"usage": used}

    def first(self) -> dict[str, Any] | None:
        """What comes before any text: in a chat the role."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self.chat else None

    def piece(self, text: str) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk({"content": text} if self.chat else text, None)

    def last(self, reason: str) -> dict[str, Any]:
        """The chunk that says why the text ends."""
        return self._chunk({} if self.chat else "", reason)

    def usage(self, used: dict[str, int]) -> dict[str, Any]:
        """The chunk after the last, when it was asked for."""
        return self._frame(self._kind, []) | {"usage": used}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, said: Any, reason: str | None) -> dict[str, Any]:
        made = self._frame(self._kind, [self._choice({"delta" if self.chat else "text": said}, reason)])
        return made | {"usage": None} if self.with_usage else made

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    @staticmethod
    def _choice(said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}


def used(prompt: int, completion: int) -> dict[str, int]:
    """The usage object, in tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def event(data: dict[str, Any] | str) -> bytes:
    """One server-sent event; JSON on one line, so that no text can end it early."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode(errors="replace")
