"""The fields that a request may hold. Whatever this server would have to ignore is refused by its name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoal.serve.limits import RefusedError

_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields whose effect this server does not have, with the values that ask for none."""
_WITHOUT_EFFECT = (
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
)  # fmt: skip
"""Fields that do not change what is written."""

_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Id = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """Only with `stream`."""

    include_usage: bool = False


class _Asked(_Strict):
    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream=true only")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(_Asked):
    """POST /v1/completions: one prompt, as text or as token ids."""

    prompt: (
        str | list[_Id] | Annotated[list[str], Field(max_length=1)] | Annotated[list[list[_Id]], Field(max_length=1)]
    )

    @property
    def text_or_ids(self) -> str | list[int]:
        """The one prompt."""
        one = self.prompt
        return one[0] if isinstance(one, list) and one and not isinstance(one[0], int) else one  # type: ignore[return-value]

    @property
    def wanted(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # the default of OpenAI's interface


class TextPart(_Strict):
    """A part of a message; images and sound are refused."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Chat(_Asked):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @property
    def wanted(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


Asked = TypeVar("Asked", Completion, Chat)


def parse(kind: type[Asked], body: bytes) -> Asked:
    """The request in `body`. Raises `RefusedError` 400 for what is no JSON object, for a field that is wrong or
    unknown, and for one whose effect this server does not have."""
    try:
        raw = json.loads(body, parse_constant=_no_number)
        json.dumps(raw, ensure_ascii=False).encode()  # half of a surrogate pair is legal JSON, but no text
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RefusedError(400, f"the body is not valid JSON: {why}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise RefusedError(400, "the body is not a JSON object; send one with the fields of the request")
    given = {name: value for name, value in raw.items() if value is not None and name not in _WITHOUT_EFFECT}
    for name, values in _ONLY.items():
        if name in given:
            value = given.pop(name)
            if not any(type(value) is type(one) and value == one for one in values):
                raise RefusedError(
                    400,
                    f"this server does not support {name}; leave it out or send {json.dumps(values[0])}",
                    param=name,
                    code="unsupported_parameter",
                )
    if isinstance(given.get("messages"), list):  # clients send an answer back as the next question, with its nulls
        given["messages"] = [
            {k: v for k, v in one.items() if v is not None} if isinstance(one, dict) else one
            for one in given["messages"]
        ]
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refused(error, given) from None


def _refused(error: ValidationError, given: dict[str, Any]) -> RefusedError:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in _NAMES) or None
    if first["type"] == "extra_forbidden":
        where = ".".join(map(str, first["loc"]))
        return RefusedError(
            400, f"this server does not know {where}; leave it out", param=where, code="unknown_parameter"
        )
    several = given.get("prompt")
    if where == "prompt" and isinstance(several, list) and len(several) > 1 and not isinstance(several[0], int):
        return RefusedError(
            400,
            f"{len(several)} prompts in one request; send one a request",
            param="prompt",
            code="unsupported_parameter",
        )
    what = first["msg"].removeprefix("Value error, ")
    if where and first["type"] != "missing":
        what = _EITHER.get(where.rpartition(".")[2], what)
    return RefusedError(400, f"{where}: {what}" if where else what, param=where, code="invalid_value")


_NAMES = {name for one in (Completion, Chat, Message, TextPart, StreamOptions) for name in one.model_fields}

_EITHER = {
    "prompt": "must be one text or one list of token ids",
    "stop": "must be a text or up to 4 texts of 1 to 1000 letters",
    "content": "must be a text or a list of parts of type text",
}
"""Fields with several types, of which pydantic's first sentence knows one."""


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not a number that JSON has")
