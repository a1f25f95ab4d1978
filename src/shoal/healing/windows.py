"""Windows of text that a stage reads: what is trained on, what is held out, and which columns count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from shoal.data import Data
from shoal.errors import DataError

NOT_COUNTED = -100
"""The label of a column that does not count, as transformers has it."""


@dataclass(frozen=True)
class Texts:
    """One text in two parts that share no window."""

    train: Data
    held: Data


def part(data: Data, held: int, *, causal: bool = True) -> Texts:
    """Windows held out of `data`, evenly over it, and the rest; those without a token that counts are in neither.

    `held` windows, and not more than a quarter. Raises D494 where no token counts, D413 for a single window.
    """
    counted = torch.stack(
        [labels_of(ids, data, n, causal=causal).ne(NOT_COUNTED).any() for n, ids in enumerate(data.ids)]
    )
    useful = counted.nonzero()[:, 0].tolist()
    if not useful:
        raise DataError(
            f"no token of {data.info.source} counts: its windows hold no answer of an assistant; use longer windows "
            "(--length), or text",
            code="D494",
        )
    if len(useful) < 2:
        raise DataError(
            f"{data.info.source} gives one window of {data.info.length} tokens, and one must be held out; use shorter "
            "windows (--length), or more text",
            code="D413",
        )
    number = max(1, min(held, len(useful) // 4))
    places = {round((n + 0.5) * len(useful) / number - 0.5) for n in range(number)}
    kept = [row for n, row in enumerate(useful) if n not in places]
    return Texts(described(data, kept), described(data, [useful[n] for n in sorted(places)]))


def described(data: Data, rows: list[int]) -> Data:
    """These windows, with the hash that they have."""
    from dataclasses import replace

    from shoal.data.load import sha256_of

    chosen = data.only(rows)
    info = replace(data.info, count=len(rows), tokens=chosen.ids.numel(), sha256=sha256_of(chosen.ids))
    return replace(chosen, info=info)


def labels_of(ids: torch.Tensor, data: Data, row: int, *, causal: bool = True) -> torch.Tensor:
    """What each column of one window [tokens] predicts, -100 where it does not count: padding, and of conversations all
    but what the assistant said. Of an encoder each real column counts, and its label is its own token."""
    real = torch.ones_like(ids, dtype=torch.bool) if data.mask is None else data.mask[row].bool()
    if not causal:
        return torch.where(real, ids, NOT_COUNTED)
    wanted = real if data.answers is None else real & data.answers[row]
    labels = torch.full_like(ids, NOT_COUNTED)
    labels[:-1] = torch.where(wanted[1:] & real[:-1], ids[1:], NOT_COUNTED)
    return labels


class Windows(Dataset[dict[str, torch.Tensor]]):
    """The windows of some data as Trainer wants them."""

    def __init__(self, data: Data, *, causal: bool = True) -> None:
        self.data, self.causal = data, causal

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = self.data.ids[row]
        labels = labels_of(ids, self.data, row, causal=self.causal)
        more = {"mask": self.data.mask, "own": self.data.own}
        given = {name: tensor[row] for name, tensor in more.items() if tensor is not None}
        return {"ids": ids, "shift_labels": labels, "labels": labels, **given}

    def counted(self) -> int:
        """Columns that count, in all."""
        return sum(int(self[row]["labels"].ne(NOT_COUNTED).sum()) for row in range(len(self)))


def collated(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Rows of one length as a batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def concatenated(parts: list[Data]) -> Data:
    """Windows of one length from several sources, one source behind the other."""
    from dataclasses import replace

    from shoal.data.load import sha256_of

    if len(parts) == 1:
        return parts[0]
    ids = torch.cat([one.ids for one in parts])
    masks = [torch.ones_like(one.ids) if one.mask is None else one.mask for one in parts]
    answers = [torch.ones_like(one.ids, dtype=torch.bool) if one.answers is None else one.answers for one in parts]
    whole = all(one.mask is None for one in parts)
    every = all(one.answers is None for one in parts)
    own = [torch.zeros(len(one), dtype=torch.bool) if one.own is None else one.own for one in parts]
    alike = all(one.own is None for one in parts)
    info = replace(
        parts[0].info,
        source=" + ".join(f"{one.info.source} ({len(one)})" for one in parts),
        count=len(ids),
        tokens=ids.numel(),
        sha256=sha256_of(ids),
    )
    return Data(
        ids, None if whole else torch.cat(masks), info, None if every else torch.cat(answers),
        None if alike else torch.cat(own),
    )  # fmt: skip
