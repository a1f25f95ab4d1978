"""Prompts: three kinds that come along, and files of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shoal.api.assess import tokenizer_of
from shoal.data.chat import messages_of
from shoal.data.documents import CHATS, PROMPTS, value_of
from shoal.data.opening import lines_of, opened
from shoal.data.rows import rows_of
from shoal.errors import DataError
from shoal.models.calls import device_of
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
    """Prompts of a file: one in each line of text, or in each row of a .jsonl, .json, .csv or .parquet file: its
    `prompt`, `instruction` (with its input) or `question`, or the first user's turn of its conversation.

    Raises D401 for a missing file, D404 for one that is not text, D407, D408 or D487 for a bad row, D461 for none.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file of prompts {path}; give one with a prompt in each line", code="D401")
    rows = rows_of(path, None)
    if rows is None:
        with opened(path) as file:
            found = [line.removesuffix("\n") for _, line in lines_of(file, path) if line.strip()]
    else:
        found = [_prompt(row, where) for where, row in rows]
    if not found:
        raise DataError(f"{path.name} holds no prompt; write one in each line", code="D461")
    return found


def _prompt(row: Mapping[str, Any], where: str) -> str:
    key = next((name for name in ("prompt", *PROMPTS) if isinstance(row.get(name), str)), None)
    if key is not None:
        more = row.get("input") if key == "instruction" else None
        return f"{row[key]}\n\n{more}" if isinstance(more, str) and more.strip() else str(row[key])
    chat = next((name for name in CHATS if name in row), None)
    if chat is None:
        return value_of(row, "prompt", where, "write each prompt under that key")
    asked = [one["content"] for one in messages_of(row[chat], where, chat) if one["role"] == "user"]
    if not asked:
        raise DataError(f"{where}: {chat!r} holds no turn of the user; mend or remove that row", code="D487")
    return str(asked[0])


def encoded(loaded: Loaded, text: str, chat: bool | None) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, [1, length], with the chat template where there is one (`chat` None)."""
    tokenizer = tokenizer_of(loaded)
    if getattr(tokenizer, "chat_template", None) is not None if chat is None else chat:
        made = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        made = tokenizer(text, return_tensors="pt")
    return {name: made[name].to(device_of(loaded.model)) for name in ("input_ids", "attention_mask")}
