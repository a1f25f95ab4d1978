"""Prompts: three kinds that come along, and files of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from shoal.api.assess import tokenizer_of
from shoal.data.files import value_of
from shoal.errors import DataError
from shoal.models.load import Loaded

BUILTIN = {
    "code": (
        "Write a Python class `Stack` with the methods push, pop, peek and is_empty, each with a docstring and type "
        "hints, and then a short test for each method.",
        "Rename the variable `x` to `total` in this code and print the whole code again:\n\n"
        "def mean(values):\n    x = 0\n    for value in values:\n        x = x + value\n    if not values:\n"
        "        raise ValueError('no values')\n    return x / len(values)\n",
    ),
    "dialogue": (
        "I have two days in a small town by the sea, and it will rain. What could I do?",
        "My neighbour plays the drums every evening. How do I ask him politely to stop earlier?",
    ),
    "summary": (
        "Summarize this in two sentences: Layers of a language model do not all matter alike. Many later layers "
        "can be removed, and the model still answers simple questions, but it forgets how to reason over several "
        "steps. A draft made by a few layers can be checked by the whole model in one pass. Where it is right, "
        "several tokens are won for the price of one pass; where it is wrong, the time for drafting is lost. So the "
        "draft must be right often, or very cheap.",
        "List the facts in this text, one in each line: The harbour was built in 1887 and enlarged in 1923. It has "
        "four quays and a lighthouse of 31 metres. Since 1990 the western quay serves ferries only. In 2011 the old "
        "warehouse on the eastern quay became a museum of fishing.",
    ),
}
"""Kind of prompt -> prompts: code, dialogue, summary."""


def texts_of(prompts: Sequence[str] | None) -> list[str]:
    """The prompts, or those that come along."""
    return list(prompts) if prompts is not None else [text for kind in BUILTIN.values() for text in kind]


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a file: one in each line of text, or the `prompt` of each line of a .jsonl file.

    Raises D401 for a missing file, D404 for one that is not text, D407 or D408 for a bad line, D461 for none.
    """
    path = Path(path)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(
            f"there is no file of prompts {path}; give one with a prompt in each line", code="D401"
        ) from None
    except UnicodeDecodeError:
        raise DataError(
            f"{path.name} is not text in UTF-8; give a file with a prompt in each line", code="D404"
        ) from None
    if path.suffix.lower() == ".jsonl":
        lines = [_prompt(line, f"{path.name} line {n}") for n, line in enumerate(lines, 1)]
    if not lines:
        raise DataError(f"{path.name} holds no prompt; write one in each line", code="D461")
    return lines


def _prompt(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        raise DataError(f"{where} is not JSON; write an object with a key prompt in each line", code="D407") from None
    return value_of(row if isinstance(row, dict) else {}, "prompt", where)


def encoded(loaded: Loaded, text: str, chat: bool | None) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, [1, length], with the chat template where there is one (`chat` None)."""
    tokenizer = tokenizer_of(loaded)
    if getattr(tokenizer, "chat_template", None) is not None if chat is None else chat:
        made = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        made = tokenizer(text, return_tensors="pt")
    return {name: made[name].to(loaded.model.device) for name in ("input_ids", "attention_mask")}
