"""Text to windows of token ids: tokenised as one text, cut at a stride, described and hashed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shoal.data.builtin import SPLITS
from shoal.data.chat import chat_of
from shoal.data.document import Opened
from shoal.data.info import DataInfo
from shoal.data.mixture import apportion, fitting, interleaved
from shoal.data.sources import open_source
from shoal.data.spelled import Part, TextSource, read
from shoal.data.tokens import Tokens, tokenise
from shoal.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Windows of token ids, in the order of the text."""

    ids: torch.Tensor
    """int64 [count, length]."""
    mask: torch.Tensor | None
    """1 where a token is real, int64 [count, length]; None when nothing is padded."""
    info: DataInfo
    answers: torch.Tensor | None = None
    """Which tokens an assistant wrote, its end of turn included, bool [count, length]; None where the text (plain text,
    a template that does not tell) or the tokenizer does not say."""
    own: torch.Tensor | None = None
    """Which windows the plan that reads them wrote itself, bool [count]; None for none. See `shoal.healing`."""

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or not len(self.ids):
            raise DataError(f"data needs ids of shape [count, length], not {list(self.ids.shape)}", code="D406")
        if self.mask is not None and self.mask.shape != self.ids.shape:
            message = f"the mask has shape {list(self.mask.shape)} but the ids {list(self.ids.shape)}; make them equal"
            raise DataError(message, code="D406")

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, rows: Sequence[int]) -> Data:
        """These windows in this order."""
        at = torch.tensor(list(rows), dtype=torch.long)
        return replace(
            self,
            ids=self.ids[at],
            mask=None if self.mask is None else self.mask[at],
            answers=None if self.answers is None else self.answers[at],
            own=None if self.own is None else self.own[at],
        )

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Ids and mask of `size` windows at a time, in order; the last batch may be smaller."""
        if size < 1:
            raise DataError(f"a batch of {size} windows is empty; use 1 or more", code="D406")
        for start in range(0, len(self), size):
            stop = start + size
            yield self.ids[start:stop], None if self.mask is None else self.mask[start:stop]


def load_data(
    source: str | Path | TextSource | Iterable[str],
    tokenizer: Any,
    *,
    length: int = 512,
    limit: int = 16,
    split: str = "calibrate",
    stride: int | None = None,
    bos: bool = False,
    seed: int | None = None,
    text_key: str | None = None,
    chat_template: str | None = None,
) -> Data:
    """Read `source`, tokenise it as one text without special tokens and cut it into at most `limit` windows.

    `source` is `builtin`, a file (text; .jsonl, .json, .csv, .tsv, .parquet; packed as .gz), a hub data set
    `owner/name[:config][:split]`, several of these with weights (`a.jsonl=0.7,b.txt=0.3`, see `shoal.data.spelled`), or
    texts. Rows hold text under `text_key` (default `text`; also `FILE:KEY`), conversations or prompts with responses
    (`shoal.data.documents`), which the tokenizer's chat template writes, or `chat_template`: a file of Jinja, or
    `plain` for the contents alone. Documents are joined by blank lines, conversations follow each other.

    Windows start every `stride` tokens (default: where the last one ended); an incomplete last window is left out. With
    `seed` the windows are a random choice, else the first ones. With `bos` each window is the tokenizer's BOS token and
    `length - 1` tokens of text. Of a mixture each source gives its share of the windows, in an order drawn with `seed`,
    and as few as the shortest one asks for. `split` cuts the built-in text; of any other source the whole is used and
    `split` only recorded. Raises `DataError`.
    """
    _require(length, limit, stride, split)
    strict = chat_template is not None
    if isinstance(source, TextSource):
        strict = strict or (source.chat_template is not None and not source.may_be_text)
        text_key, chat_template = source.key or text_key, source.chat_template or chat_template
        source = source.text
    parts = _parts(source)
    start = _bos(tokenizer) if bos else []
    body = length - len(start)
    step = stride or body
    if len(parts) > 1 and step < body:
        raise DataError("windows of a mixture cannot overlap; leave --stride out", code="D490")
    chat = chat_of(tokenizer, chat_template)
    opened = [open_source(one, split, text_key, chat) for one in parts]
    if strict and not any(one.chat for one in opened):
        raise DataError(
            f"{opened[0].name} holds plain text, which no chat template writes; leave --chat-template out", code="D493"
        )
    shares = _shares(parts)
    quotas = apportion(limit, shares)
    texts, counts = list[Tokens](), list[int]()
    for one, quota in zip(opened, quotas, strict=True):
        texts.append(tokenise(one, tokenizer, (quota - 1) * step + body if seed is None else None))
        counts.append(_count(texts[-1], one.name, body, step, len(start)))
    quotas = fitting(quotas, counts, shares)
    chosen = [_choose(count, quota, seed) for count, quota in zip(counts, quotas, strict=True)]
    rows = [(texts[part], i) for part, i in interleaved(chosen, seed or 0)]
    ids = torch.tensor([start + text.ids[i * step : i * step + body] for text, i in rows], dtype=torch.int64)
    info = DataInfo(
        _name(parts, opened), split, length, len(ids), step, "each" if bos else "none", ids.numel(), sha256_of(ids),
        seed, _how(opened),
    )  # fmt: skip
    return Data(ids, None, info, _answers(rows, len(start), body, step))


def _parts(source: str | Path | Iterable[str]) -> Sequence[Part | Path | Iterable[str]]:
    if not isinstance(source, str):
        return (source,)
    if "\n" in source or len(source) > 1024:
        raise DataError("the data is a text where a name was expected; put the text in a list", code="D406")
    return read(source)


def _shares(parts: Sequence[Any]) -> list[float]:
    """Of all windows, by source."""
    weights = [one.weight if isinstance(one, Part) and one.weight is not None else 1.0 for one in parts]
    return [weight / sum(weights) for weight in weights]


def _name(parts: Sequence[Any], opened: Sequence[Opened]) -> str:
    if len(parts) == 1:
        return opened[0].name
    return ",".join(f"{one.name}={part.weight:g}" for part, one in zip(parts, opened, strict=True))


def _how(opened: Sequence[Opened]) -> str | None:
    if len(opened) == 1:
        return opened[0].how
    return "; ".join(f"{one.name}: {one.how}" for one in opened if one.how is not None) or None


def _count(text: Tokens, name: str, body: int, step: int, added: int) -> int:
    """How many windows there are. Raises D405 for none."""
    if len(text.ids) < body:
        fits = f"use --length {len(text.ids) + added} or less, or more text"
        raise DataError(f"{name} has {len(text.ids)} tokens, fewer than one window of {body}; {fits}", code="D405")
    return (len(text.ids) - body) // step + 1


def _answers(rows: Sequence[tuple[Tokens, int]], added: int, body: int, step: int) -> torch.Tensor | None:
    found = list[list[bool]]()
    for text, i in rows:
        if text.answers is None:
            return None
        found.append([False] * added + text.answers[i * step : i * step + body])
    return torch.tensor(found, dtype=torch.bool)


def _require(length: int, limit: int, stride: int | None, split: str) -> None:
    if length < 2:
        raise DataError(f"a window of {length} tokens predicts nothing; use --length 2 or more", code="D406")
    if limit < 1:
        raise DataError(f"a limit of {limit} windows leaves no data; use --limit 1 or more", code="D406")
    if stride is not None and stride < 1:
        raise DataError(f"a stride of {stride} never moves on; use --stride 1 or more", code="D406")
    if split not in (*SPLITS, "whole"):
        raise DataError(f"there is no split {split!r}; use calibrate, tune, test or whole", code="D406")


def _choose(available: int, limit: int, seed: int | None) -> list[int]:
    windows, number = range(available), min(limit, available)
    return list(windows[:number]) if seed is None else sorted(random.Random(seed).sample(windows, number))


def _bos(tokenizer: Any) -> list[int]:
    if tokenizer.bos_token_id is None:
        raise DataError("this tokenizer has no BOS token; leave bos off", code="D412")
    return [int(tokenizer.bos_token_id)]


def sha256_of(ids: torch.Tensor) -> str:
    """The hash of `DataInfo`: of the ids as little-endian int64, row by row."""
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
