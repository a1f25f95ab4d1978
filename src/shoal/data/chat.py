"""Conversations as the chat template of a model writes them, and which of it the assistant said."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.data.document import Document, Spans
from shoal.data.opening import opened
from shoal.data.spelled import is_there, path_of
from shoal.errors import DataError

PLAIN = "plain"
"""In place of a template: the contents alone, with blank lines between."""
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool",
    "function": "tool", "observation": "tool",
}  # fmt: skip
"""What is typed in files of messages and of ShareGPT -> the role that chat templates know."""
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chat:
    """How messages become text."""

    tokenizer: Any
    template: str | None = None
    """Jinja in place of the model's own template, or `plain`."""
    named: str = "the model's chat template"

    @property
    def plain(self) -> bool:
        """Whether contents are joined without a template."""
        return self.template == PLAIN

    @property
    def there(self) -> bool:
        """Whether messages can be written."""
        return self.template is not None or getattr(self.tokenizer, "chat_template", None) is not None

    @property
    def said(self) -> str:
        """How messages are written, for records: by which template, with a hash of its text."""
        if self.plain:
            return "without a chat template"
        text = self.template or getattr(self.tokenizer, "chat_template", None)
        if isinstance(text, dict):
            text = text.get("default", str(text))
        return f"by {self.named} ({hashlib.sha256(str(text).encode()).hexdigest()[:12]})"


def chat_of(tokenizer: Any, template: str | None) -> Chat:
    """The chat of a tokenizer; `template`: a file of Jinja, or `plain`. Raises D492 for a file that is none."""
    if template is None or template == PLAIN:
        return Chat(tokenizer, template)
    path = path_of(template)
    if not is_there(path) or path.is_dir():
        raise DataError(f"there is no chat template {template}; give a file of Jinja, or {PLAIN!r}", code="D492")
    with opened(path) as file:
        text = file.read()
    if not text.strip():
        raise DataError(f"the chat template {path.name} is empty; give a file of Jinja, or {PLAIN!r}", code="D492")
    return Chat(tokenizer, text, f"the chat template {path.name}")


def written(chat: Chat, messages: Sequence[Message], where: str, tools: Any = None) -> Document:
    """A conversation as text, with the spans of the assistant's turns.

    Raises D485 where there is no template, D486 where it does not take these messages or leaves one out.
    """
    if not chat.there:
        raise DataError(
            f"{where} holds messages and the model has no chat template; give --chat-template FILE (Jinja), or "
            f"--chat-template {PLAIN} for the contents with blank lines between",
            code="D485",
        )
    if chat.plain:
        return _plain(messages, where)
    text = _rendered(chat, messages, where, tools)
    _require_all(chat, messages, text, where, tools)
    return Document(text, _answers(chat, messages, text, where, tools))


def messages_of(found: Any, where: str, key: str) -> list[Message]:
    """Messages with `role` and `content`, from those of OpenAI's format or of ShareGPT's (`from`, `value`).

    Raises D487 for what is no list of them, without content, or of a role that no template knows.
    """
    if not isinstance(found, list | tuple) or not found:
        what = "no message" if isinstance(found, list | tuple) else f"a {type(found).__name__}"
        raise DataError(f"{where}: {key!r} holds {what}; write a list of {{role, content}}", code="D487")
    return [_message(one, f"{where}: message {number}") for number, one in enumerate(found, 1)]


def _message(found: Any, where: str) -> Message:
    if not isinstance(found, Mapping):
        raise DataError(f"{where} is a {type(found).__name__}; write {{role, content}}", code="D487")
    named, said = ("role", "content") if found.get("role") is not None else ("from", "value")
    said = said if said in found else next((key for key in ("content", "value", "text") if key in found), said)
    role, content = found.get(named), found.get(said)
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        known = ", ".join(dict.fromkeys(ROLES.values()))
        what = "has no role" if role is None else f"has the role {role!r:.40}"
        raise DataError(f"{where} {what}; the roles are {known} (and ShareGPT's human and gpt)", code="D487")
    calls = found.get("tool_calls")
    if content is None and not calls:
        raise DataError(f"{where} has no {said}; write its text, or remove that line", code="D487")
    more = {key: found[key] for key in ("tool_calls", "tool_call_id", "name", "reasoning_content") if found.get(key)}
    return {"role": ROLES[role.strip().lower()], "content": _text(content, where), **more}


def _text(content: Any, where: str) -> str:
    """The text of a content, which may be a list of parts."""
    if isinstance(content, list | tuple):
        return "".join(_part(part, where) for part in content)
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where} holds a {type(content).__name__} as its content; write text", code="D487")
    return content or ""


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(
            f"{where} has a part of type {kind!r:.40}; text alone is read, so remove that line", code="D487"
        )
    return str(part["text"])


def _plain(messages: Sequence[Message], where: str) -> Document:
    text, answers = "", list[tuple[int, int]]()
    for message in messages:
        start = len(text) + (2 if text else 0)
        text += ("\n\n" if text else "") + message["content"]
        if message["role"] == "assistant":
            answers.append((start, len(text)))
    return Document(text, tuple(answers))


def _rendered(chat: Chat, messages: Sequence[Message], where: str, tools: Any, **more: Any) -> str:
    options = {"chat_template": chat.template} if chat.template is not None else {}
    try:
        return str(
            chat.tokenizer.apply_chat_template(list(messages), tokenize=False, tools=tools or None, **options, **more)
        )
    except ImportError:
        raise DataError(f"{where} holds messages, and writing them needs: pip install jinja2", code="D409") from None
    except Exception as error:  # a template is a program of its own: Jinja's errors, and what its expressions raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"{where}: {chat.named} does not take these messages ({reason}); mend or remove that line, or give another "
            "--chat-template",
            code="D486",
        ) from None


def _require_all(chat: Chat, messages: Sequence[Message], text: str, where: str, tools: Any) -> None:
    """Raise D486 where the template writes the same without a message: those of a role that it passes over."""
    for number, message in enumerate(messages):
        if message["role"] in ("user", "assistant") or not message["content"].strip():
            continue
        try:
            same = _rendered(chat, [*messages[:number], *messages[number + 1 :]], where, tools) == text
        except DataError:  # it cannot do without
            same = False
        if same:
            raise DataError(
                f"{where}: {chat.named} leaves out message {number + 1}, whose role is {message['role']!r}; remove "
                "that message, or give another --chat-template",
                code="D486",
            )


def _answers(chat: Chat, messages: Sequence[Message], text: str, where: str, tools: Any) -> Spans | None:
    """The assistant's turns in `text`: from the end of the generation prompt to the end of the turn. None where the
    template does not write a conversation as the beginning of a longer one."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before = _rendered(chat, messages[:number], where, tools, add_generation_prompt=True) if number else ""
            after = _rendered(chat, messages[: number + 1], where, tools)
        except DataError:  # a part of a conversation may be none to the template
            return None
        if not text.startswith(after) or not after.startswith(before):
            return None
        spans.append((len(before), len(after.rstrip())))
    return tuple(spans)
