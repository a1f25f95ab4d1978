"""From a request's text to token ids that fit into the model."""

from __future__ import annotations

from typing import Any

from shoal.errors import first_line
from shoal.serve.limits import RefusedError
from shoal.serve.schemas import Chat, Completion


class Prompts:
    """The tokenizer and the limits of one model.

    `context`: positions for prompt and answer together, None when the model names none. `most`: new tokens that one
    request may ask for. `vocabulary`: rows of the embedding. One thread at a time: fast tokenizers keep the settings of
    a call in themselves.
    """

    def __init__(self, tokenizer: Any, *, model: str, vocabulary: int, context: int | None, most: int) -> None:
        self._tokenizer, self._model, self._vocabulary = tokenizer, model, vocabulary
        self._context, self._most = context, most

    @property
    def can_chat(self) -> bool:
        """Whether the model has a chat template."""
        return getattr(self._tokenizer, "chat_template", None) is not None

    def encode(self, asked: Completion | Chat) -> tuple[tuple[int, ...], int]:
        """The ids of the prompt and the number of tokens that may be written. Raises `RefusedError` 400."""
        field = "prompt" if isinstance(asked, Completion) else "messages"
        if asked.wanted is not None and asked.wanted > self._most:
            raise RefusedError(
                400,
                f"max_tokens is {asked.wanted}, and this server writes at most {self._most}; ask for fewer",
                param="max_tokens",
                code="max_tokens_too_large",
            )
        ids = self._ids(asked.text_or_ids) if isinstance(asked, Completion) else self._chat(asked)
        if not ids:
            raise RefusedError(400, f"{field} has no tokens; send some text", param=field, code="empty_prompt")
        return tuple(ids), self._room(len(ids), asked.wanted, field)

    def _room(self, prompt: int, wanted: int | None, field: str) -> int:
        if self._context is None:
            return self._most if wanted is None else wanted
        if prompt + (1 if wanted is None else wanted) > self._context:
            answer = "" if wanted is None else f" and {wanted} in the completion"
            raise RefusedError(
                400,
                f"This model's maximum context length is {self._context} tokens, but the request has {prompt} in the "
                f"{field}{answer}; send less text or ask for fewer tokens",
                param=field,
                code="context_length_exceeded",
            )
        return min(self._most, self._context - prompt) if wanted is None else wanted

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer(prompt, verbose=False)["input_ids"]
            return ids
        for token in prompt:
            if token >= self._vocabulary:
                raise RefusedError(
                    400,
                    f"token {token} is not one of the {self._vocabulary} of this model; send ids below that",
                    param="prompt",
                    code="invalid_value",
                )
        return prompt

    def _chat(self, asked: Chat) -> list[int]:
        if not self.can_chat:
            raise RefusedError(
                400,
                f"{self._model} has no chat template, so a conversation cannot be put to it; use /v1/completions",
                code="no_chat_template",
            )
        turns = [one.plain() for one in asked.messages]
        try:
            made = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # a template is a program of other people: it raises what it likes
            why = first_line(error)
            raise RefusedError(
                400, f"the chat template refuses these messages: {why}", param="messages", code="chat_template"
            ) from None
        ids: list[int] = made["input_ids"]
        return ids
