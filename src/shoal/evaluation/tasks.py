"""Last-word and multiple-choice items from a jsonl file, scored by the log-probability of what may follow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from shoal.errors import UsageError
from shoal.evaluation.scoring import Progress, evaluating, logits_of, require_context

Score = Literal["accuracy", "logprob"]


@dataclass(frozen=True, slots=True)
class Item:
    """What comes before, what may follow, and which of it is right. One choice alone is to be foretold word for
    word."""

    context: str
    choices: tuple[str, ...]
    gold: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """One choice of an item as tokens; the last `scored` of `ids` are the choice's own."""

    ids: tuple[int, ...]
    scored: int


def load_items(path: str | Path, limit: int | None = None) -> tuple[Item, ...]:
    """Items of a jsonl file, at most `limit`: lines with `context` and `continuation` (LAMBADA), or with `query` (or
    `context`), `choices` and `gold`, the number of the right choice from 0.

    Raises U532 for a file that cannot be read, a line that is no such item, and a file without any.
    """
    items: list[Item] = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(items) == limit:
                    break
                if line.strip():
                    items.append(_item(line, f"{Path(path).name} line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the items of {path}: {error}; name a readable jsonl file", code="U532") from None
    if not items:
        raise UsageError(f"{path} holds no items; give one JSON object a line", code="U532")
    return tuple(items)


def _item(line: str, where: str) -> Item:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if isinstance(found, dict):
        context, only = found.get("query", found.get("context")), found.get("continuation")
        choices, gold = found.get("choices"), found.get("gold")
        if isinstance(context, str) and isinstance(only, str) and only.strip():
            return Item(context, (only,))
        texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
        if isinstance(context, str) and texts and isinstance(gold, int) and 0 <= gold < len(choices or ()):
            return Item(context, tuple(choices or ()), gold)
    raise UsageError(
        f"{where} is no item; write context and continuation, or query, choices and gold (the number of the right one)",
        code="U532",
    )


def item_scores(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    score: Score = "accuracy",
    batch: int = 1,
    progress: Progress | None = None,
) -> list[float]:
    """One number for each item, higher is better.

    With log P(choice | context) = the sum over the choice's tokens: `accuracy` is 1 if the right choice has the highest
    sum, or, where there is one choice only, if greedy decoding would write it; `logprob` is the log-probability of the
    right choice among the choices, or of the only one, in nats. Raises U510 for an item longer than the context.
    """
    pieces = [_encoded(tokenizer, item.context, choice) for item in items for choice in item.choices]
    require_context(model, max(len(piece.ids) for piece in pieces))
    sums, exact = _followed(model, pieces, batch, progress)
    scores: list[float] = []
    place = 0
    for item in items:
        own = torch.tensor(sums[place : place + len(item.choices)], dtype=torch.float64)
        if len(item.choices) == 1:
            scores.append(float(exact[place]) if score == "accuracy" else own[0].item())
        elif score == "accuracy":
            scores.append(float(own.argmax().item() == item.gold))
        else:
            scores.append(own.log_softmax(0)[item.gold].item())
        place += len(item.choices)
    return scores


def _encoded(tokenizer: Any, context: str, choice: str) -> Encoded:
    """Tokens of context and choice, joined by a space unless there is one; what differs from the context's own tokens,
    at least one, is scored."""
    joined = context if not context or context[-1].isspace() or choice[0].isspace() else f"{context} "
    before = tokenizer(joined.rstrip(), add_special_tokens=False)["input_ids"]
    ids = tokenizer(joined + choice, add_special_tokens=False)["input_ids"]
    start = min(len(before), len(ids) - 1)
    if start == 0:  # nothing to predict the first token from
        lead = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids, start = [lead if lead is not None else ids[0], *ids], 1
    return Encoded(tuple(ids), len(ids) - start)


def _followed(
    model: Any, pieces: Sequence[Encoded], batch: int, progress: Progress | None
) -> tuple[list[float], list[bool]]:
    """For each piece the log-probability of its scored tokens, and whether each was the model's first choice."""
    sums, exact, done = [0.0] * len(pieces), [False] * len(pieces), 0
    with evaluating(model):
        for places in _by_length(pieces, batch):
            longest = max(len(pieces[i].ids) for i in places)
            ids = torch.zeros(len(places), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(places):
                ids[row, : len(pieces[i].ids)] = torch.tensor(pieces[i].ids)
                mask[row, : len(pieces[i].ids)] = 1
            logits = logits_of(model, ids, None if bool(mask.all()) else mask)
            for row, i in enumerate(places):
                end = len(pieces[i].ids)
                part = slice(end - 1 - pieces[i].scored, end - 1)
                wanted = ids[row, part.start + 1 : end].to(logits.device)
                found = logits[row, part].float().log_softmax(-1)
                sums[i] = found.gather(-1, wanted[:, None]).cpu().double().sum().item()
                exact[i] = bool((found.argmax(-1) == wanted).all())
            done += len(places)
            if progress is not None:
                progress(done, len(pieces), "items")
    return sums, exact


def _by_length(pieces: Sequence[Encoded], batch: int) -> Iterator[list[int]]:
    """Places of `batch` pieces at a time, alike in length so that little is padded."""
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i].ids))
    for start in range(0, len(order), batch):
        yield order[start : start + batch]
