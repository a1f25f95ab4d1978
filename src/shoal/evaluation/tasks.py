"""Tasks with one right answer: the last word of a passage, or one of several choices, by log-likelihood."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shoal.errors import DataError
from shoal.evaluation.pairs import is_paired, paired_scores, paired_tokens
from shoal.evaluation.scoring import Progress
from shoal.models.calls import device_of
from shoal.models.context import positions_of
from shoal.models.evaluating import evaluating
from shoal.models.kinds import require_answers

CONTEXTS = ("context", "query", "question", "prompt")
GOLDS = ("gold", "label", "answer")
"""Keys under which files of common harnesses keep the same thing; the first that is there counts."""


@dataclass(frozen=True, slots=True)
class Item:
    """A context and its possible continuations; with one option the model must write it by itself."""

    context: str
    options: tuple[str, ...]
    gold: int = 0


@dataclass(frozen=True, slots=True)
class Tasks:
    """The items of one file."""

    name: str
    items: tuple[Item, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class TaskScore:
    """How many items a model got right."""

    name: str
    accuracy: float
    """Share of items whose right option is the likeliest as a whole, or is written greedily, token by token."""
    error: float | None
    """Standard error of `accuracy`; None for a single item."""
    normalised: float | None
    """The same with log-likelihood per character, which long options need; None where there is nothing to choose."""
    nll: float
    """Mean over items of the right option's negative log-likelihood, in nats per item; NaN where it is not known."""
    items: int
    correct: tuple[bool, ...]
    """By item, for paired comparisons."""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "correct"}


class Option(NamedTuple):
    """How a model takes one option."""

    logprob: float
    """Of all its tokens, in nats."""
    written: bool
    """Whether greedy decoding would write it."""


def load_tasks(path: str | Path, *, limit: int | None = None) -> Tasks:
    """Read a .jsonl file with one item a line: {"context", "continuation"} as LAMBADA has it, or {"query", "choices",
    "gold"} as PIQA; `gold` counts from 0. `limit`: the first so many.

    Raises `DataError` D450 for a file or a line that is no such item, naming the line, D451 for a file without items.
    """
    name, rows, sha256 = rows_of(path, limit=limit)
    return Tasks(name, tuple(_item(row, where) for row, where in rows), sha256)


def rows_of(path: str | Path, *, limit: int | None = None) -> tuple[str, list[tuple[dict[str, Any], str]], str]:
    """The name of a .jsonl file, its first `limit` objects with the words for where each stands (an empty one for what
    is none), and the sha256 of what was read. Raises D450 and D451 as `load_tasks` does."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"cannot read the tasks {file} ({why}); name a .jsonl file", code="D450") from None
    lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()][:limit]
    rows = [(_row(line, where), where) for line, where in ((own, f"{file.name}, line {n}") for n, own in lines)]
    if not rows:
        raise DataError(f"{file} holds no items; name another file or raise the limit", code="D451")
    return file.stem, rows, hashlib.sha256("\n".join(line for _, line in lines).encode()).hexdigest()


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{where} is not JSON; mend or remove that line", code="D450") from None
    return row if isinstance(row, dict) else {}


def _item(row: dict[str, Any], where: str) -> Item:
    context = next((row[key] for key in CONTEXTS if isinstance(row.get(key), str)), None)
    if context is not None and isinstance(row.get("continuation"), str) and row["continuation"].strip():
        return Item(context, (row["continuation"],))
    options, gold = row.get("choices"), next((row[key] for key in GOLDS if key in row), None)
    if (
        context is not None
        and isinstance(options, list)
        and len(options) > 1
        and all(isinstance(option, str) and option.strip() for option in options)
        and isinstance(gold, int)
        and 0 <= gold < len(options)
    ):
        return Item(context, tuple(options), gold)
    raise DataError(
        f"{where} is no item; write {{context, continuation}}, or {{query, choices, gold}} with gold counting from 0",
        code="D450",
    )


def score_tasks(
    model: Any, tokenizer: Any, tasks: Tasks, *, batch: int = 8, progress: Progress | None = None
) -> TaskScore:
    """Score every option of every item by its log-likelihood after the context (uncached, float32 log-softmax).

    As lm-eval does it: context and option are tokenised together and parted where the context's own tokens end, white
    space between them belongs to the option, and an option's tokens are all predicted from the left. A context that
    is too long for the model loses its beginning. An encoder-decoder reads the context in its encoder, and its decoder
    scores the option with the end of the text behind it. Raises M322 for a model that does neither.
    """
    return _summary(tasks, option_scores(model, tokenizer, tasks, batch=batch, progress=progress))


def option_scores(
    model: Any, tokenizer: Any, tasks: Tasks, *, batch: int = 8, progress: Progress | None = None
) -> list[tuple[Option, ...]]:
    """For each item the scores of its options, as `score_tasks` computes them."""
    require_answers(model, "scoring the items of a task")
    asked: list[Any]
    if is_paired(model):
        asked = [paired_tokens(model, tokenizer, one.context, option) for one in tasks.items for option in one.options]
    else:
        asked = [_tokens(model, tokenizer, one.context, option) for one in tasks.items for option in one.options]
    scored = paired_scores if is_paired(model) else _scored
    found = [Option(math.nan, False)] * len(asked)
    order = sorted(range(len(asked)), key=lambda n: len(asked[n][0]))  # alike lengths together: less padding
    with evaluating(model):
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            for row, result in zip(rows, scored(model, [asked[row] for row in rows]), strict=True):
                found[row] = Option(*result)
            if progress is not None:
                progress(min(start + batch, len(order)), len(order), tasks.name)
    each = iter(found)
    return [tuple(next(each) for _ in item.options) for item in tasks.items]


def _tokens(model: Any, tokenizer: Any, context: str, option: str) -> tuple[list[int], int]:
    """The ids of context and option together, and how many of them are the option's."""
    stripped = context.rstrip()
    space = context[len(stripped) :] or (" " if stripped else "")
    head = tokenizer(stripped, add_special_tokens=False)["input_ids"] if stripped else []
    whole = tokenizer(f"{stripped}{space}{option.lstrip()}", add_special_tokens=False)["input_ids"]
    if not head:
        begin = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
        head, whole = [begin], [begin, *whole]
    limit = positions_of(model)
    answer = max(1, len(whole) - len(head))
    kept = whole if limit is None else whole[-limit:]
    return kept, min(answer, len(kept) - 1)


def _scored(model: Any, asked: Sequence[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
    longest = max(len(ids) for ids, _ in asked)
    device = device_of(model)
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in asked], device=device)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in asked], device=device)
    logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits
    for row, (ids, answer) in enumerate(asked):
        end = len(ids)
        scores = logits[row, end - answer - 1 : end - 1].float().log_softmax(-1)
        wanted = padded[row, end - answer : end].to(scores.device)
        yield float(scores.gather(-1, wanted[:, None]).sum()), bool((scores.argmax(-1) == wanted).all())


def _summary(tasks: Tasks, found: Sequence[tuple[Option, ...]]) -> TaskScore:
    right, normal, losses = [], [], []
    for item, options in zip(tasks.items, found, strict=True):
        losses.append(-options[item.gold].logprob)
        right.append(is_right(item, options))
        if len(options) > 1:
            long = [one.logprob / len(text) for one, text in zip(options, item.options, strict=True)]
            normal.append(_likeliest(long) == item.gold)
    count, accuracy = len(right), sum(right) / len(right)
    return TaskScore(
        name=tasks.name,
        accuracy=accuracy,
        error=math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else None,
        normalised=sum(normal) / len(normal) if normal else None,
        nll=math.fsum(losses) / count,
        items=count,
        correct=tuple(right),
    )


def is_right(item: Item, options: Sequence[Option]) -> bool:
    """Whether the right option is the likeliest, or the only one would be written greedily."""
    if len(options) == 1:
        return options[0].written
    return _likeliest([one.logprob for one in options]) == item.gold


def _likeliest(totals: Sequence[float]) -> int:
    """The best option; -1 where a broken model gave no number, so that nothing counts as right by chance."""
    return -1 if any(math.isnan(total) for total in totals) else max(range(len(totals)), key=totals.__getitem__)
