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
from shoal.data.info import DataInfo
from shoal.data.sources import open_source
from shoal.errors import DataError

CHARS_PER_TOKEN = 6
# The end of a cut text may be tokenised otherwise than its middle; this many tokens before the cut are not trusted.
MARGIN = 256


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """Windows of token ids, in the order of the text."""

    ids: torch.Tensor
    """int64 [count, length]."""
    mask: torch.Tensor | None
    """1 where a token is real, int64 [count, length]; None when nothing is padded."""
    info: DataInfo

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
        return replace(self, ids=self.ids[at], mask=None if self.mask is None else self.mask[at])

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Ids and mask of `size` windows at a time, in order; the last batch may be smaller."""
        if size < 1:
            raise DataError(f"a batch of {size} windows is empty; use 1 or more", code="D406")
        for start in range(0, len(self), size):
            stop = start + size
            yield self.ids[start:stop], None if self.mask is None else self.mask[start:stop]


def load_data(
    source: str | Path | Iterable[str],
    tokenizer: Any,
    *,
    length: int = 512,
    limit: int = 16,
    split: str = "calibrate",
    stride: int | None = None,
    bos: bool = False,
    seed: int | None = None,
    text_key: str | None = None,
) -> Data:
    """Read `source`, tokenise it as one text without special tokens and cut it into at most `limit` windows.

    `source` is `builtin`, a .txt, .jsonl or .parquet file, a hub data set `owner/name[:config][:split]`, or texts.
    Documents are joined by blank lines. Windows start every `stride` tokens (default: where the last one ended); an
    incomplete last window is left out. With `seed` the windows are a random choice, else the first ones. With `bos`
    each window is the tokenizer's BOS token and `length - 1` tokens of text. `split` cuts the built-in text; of any
    other source the whole is used and `split` only recorded. Raises `DataError`.
    """
    _require(length, limit, stride, split)
    start = _bos(tokenizer) if bos else []
    body = length - len(start)
    step = stride or body
    name, pieces = open_source(source, split, text_key)
    wanted = (limit - 1) * step + body if seed is None else None
    tokens = _tokenise(pieces, tokenizer, wanted, name)
    if len(tokens) < body:
        fits = f"use --length {len(tokens) + len(start)} or less, or more text"
        raise DataError(f"{name} has {len(tokens)} tokens, fewer than one window of {body}; {fits}", code="D405")
    chosen = _choose((len(tokens) - body) // step + 1, limit, seed)
    ids = torch.tensor([start + tokens[i * step : i * step + body] for i in chosen], dtype=torch.int64)
    info = DataInfo(name, split, length, len(ids), step, "each" if bos else "none", ids.numel(), _sha256(ids), seed)
    return Data(ids, None, info)


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


def _tokenise(pieces: Iterator[str], tokenizer: Any, wanted: int | None, name: str) -> list[int]:
    """At least the first `wanted` token ids of the whole text (all of them for None), reading no more than needed.

    The text is never tokenised in pieces, because tokenizers without a pre-tokenizer merge across any cut.
    """
    goal = float("inf") if wanted is None else (wanted + MARGIN) * CHARS_PER_TOKEN
    parts: list[str] = []
    size = 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if wanted is not None and size >= goal:
            text = "".join(parts)
            tokens = _encode(text, tokenizer)
            if len(tokens) >= wanted + MARGIN:
                return tokens[:wanted]
            parts, goal = [text], 2 * size
    text = "".join(parts)
    if not text.strip():
        raise DataError(f"{name} holds no text; name another source", code="D404")
    return _encode(text, tokenizer)


def _encode(text: str, tokenizer: Any) -> list[int]:
    # verbose=False: the text is longer than the model's context on purpose, and no window will be.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _sha256(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
