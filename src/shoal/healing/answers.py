"""What the dense model writes behind the beginnings of a text: training text of its own distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from shoal.data import Data
from shoal.data.load import sha256_of
from shoal.decoding.arguments import GREEDY_ALONE, sampling
from shoal.decoding.decoder import Decoder
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating

BEGINNING = 32
"""Tokens of a window of plain text that stay; of a conversation all before the first answer stays."""


def written_by(
    model: Any,
    data: Data,
    *,
    batch: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Data:
    """The windows of `data` with what `model` writes behind the beginning of each in the place of the rest; only that
    counts.

    Tokens are drawn at `temperature` (0: the likeliest). It writes on to the end of the window, past what ends a turn.
    Source: sequence-level distillation, Kim and Rush 2016 (arXiv 1606.07947).
    """
    length = data.ids.shape[1]
    starts = [_beginning(data, row) for row in range(len(data))]
    ids, counts = data.ids.clone(), torch.zeros_like(data.ids, dtype=torch.bool)
    done = 0
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in sorted(set(starts)):
            rows = [row for row, own in enumerate(starts) if own == start]
            for at in range(0, len(rows), batch):
                some = rows[at : at + batch]
                ids[some] = _continued(model, data.ids[some, :start], length, temperature)
                counts[some, start:] = True
                done += len(some)
                tell(done, len(data))
    info = replace(data.info, source=f"answers to {data.info.source}", sha256=sha256_of(ids))
    return replace(data, ids=ids, mask=None, answers=counts, info=info)


def _beginning(data: Data, row: int) -> int:
    length = data.ids.shape[1]
    if data.answers is None or not bool(data.answers[row].any()):
        return min(BEGINNING, length // 2)
    return min(max(1, int(data.answers[row].int().argmax())), length - 1)


def _continued(model: Any, ids: torch.Tensor, length: int, temperature: float) -> torch.Tensor:
    ids = ids.to(device_of(model))
    asked = GREEDY_ALONE | sampling(temperature, top_k=0, top_p=1.0)
    out: torch.Tensor = Decoder(model).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length - ids.shape[1], eos_token_id=None,
        pad_token_id=0, **asked,
    )  # fmt: skip
    return out.cpu()
