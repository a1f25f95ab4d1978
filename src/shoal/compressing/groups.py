"""Rows of a KV cache that are held together: each restores its own keys and values from one store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from shoal.compressing.row import CompressedRow
from shoal.errors import PlanError

Stored = dict[str, torch.Tensor]
"""What is held for the keys, or for the values, of all rows of a group. Each tensor begins with the batch."""
HALVES = ("keys", "values")


class Codec(Protocol):
    """How the rows of one group are held."""

    def encode(self, half: str, states: Sequence[torch.Tensor], real: torch.Tensor | None) -> Stored | None:
        """What is held for one `half`, keys or values, of each row [batch, heads, tokens, dim] after the prefill;
        None: they are held as they are. `real` bool [batch, tokens] is False at padding, None where there is none."""

    def decode(self, stored: Stored, place: int) -> torch.Tensor:
        """The keys (or the values) of the row at `place` of its group, [batch, heads, tokens, dim]."""

    def append(self, stored: Stored, states: Sequence[torch.Tensor]) -> Stored | None:
        """`stored` with the later tokens of each row; None: those are held as they are."""


class RowGroup:
    """Rows that are encoded together once every one of them holds what a forward brought."""

    def __init__(self, codec: Codec, size: int, real: torch.Tensor | None = None) -> None:
        """`real`: see `CacheJob.real`."""
        self.codec, self.real = codec, real
        self.stored: dict[str, Stored] = {}
        """By half; the same object for all rows, so that it is counted once."""
        self.encoded = 0
        """Tokens of each row that are in the store."""
        self.prefilled = False
        self.rows = [GroupedRow(self, place) for place in range(size)]

    def settle(self) -> None:
        """Encode what the rows hold as it came, once all of them hold the same tokens."""
        waiting = {row.tokens - self.encoded for row in self.rows}
        if len(waiting) > 1 or not max(waiting):
            return
        found: dict[str, Stored] = {}
        for half in HALVES:
            own = [row.own[half] for row in self.rows]
            if len({one.shape for one in own}) == 1 and own[0].shape[-1]:  # else one of the rows does not keep it
                stored = self._encode(half, own)
                found |= {} if stored is None else {half: stored}
        self.prefilled = True
        if not found:
            return
        self.stored |= found
        self.encoded += waiting.pop()
        for row in self.rows:
            row.own |= {half: row.own[half][:, :, :0].clone() for half in found}

    def _encode(self, half: str, own: list[torch.Tensor]) -> Stored | None:
        if half in self.stored:
            return self.codec.append(self.stored[half], own)
        if self.prefilled:
            return None
        shape = (own[0].shape[0], own[0].shape[2])
        if self.real is not None and self.real.shape != shape:
            raise PlanError(
                f"this KV cache was made for a prompt of the shape {tuple(self.real.shape)}, and the first forward "
                f"brought {shape}; make it with the attention mask of that forward",
                code="P161",
            )
        return self.codec.encode(half, own, None if self.real is None else self.real.to(own[0].device))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change the batch of everything that is stored."""
        for half, stored in self.stored.items():
            self.stored[half] = {name: change(tensor) for name, tensor in stored.items()}

    def reset(self) -> None:
        """Forget what is stored."""
        self.stored.clear()
        self.encoded, self.prefilled = 0, False


class GroupedRow(CompressedRow):
    """One row of a group: it answers with all of its keys and values, as they are restored."""

    def __init__(self, group: RowGroup, place: int) -> None:
        # not super().__init__, which would hold keys and values: they are restored when they are asked for
        self.group, self.place = group, place
        self.stored = group.stored
        self.own: dict[str, torch.Tensor] = {}
        """What is held as it came, by half."""
        self.tokens = 0
        self.is_initialized = False

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys, [batch, heads, tokens, dim], restored; None while there are none."""
        return self._whole("keys")

    @property
    def values(self) -> torch.Tensor | None:
        """All values, [batch, heads, tokens, dim], restored; None while there are none."""
        return self._whole("values")

    def _whole(self, half: str) -> torch.Tensor | None:
        if not self.is_initialized:
            return None
        if half not in self.stored:
            return self.own[half]
        restored = self.group.codec.decode(self.stored[half], self.place)
        return torch.cat([restored, self.own[half]], dim=-2) if self.own[half].shape[-2] else restored

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.token_size = key_states[:, :, :1].numel() + value_states[:, :, :1].numel()
        self.own = {"keys": key_states[:, :, :0].clone(), "values": value_states[:, :, :0].clone()}
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store what is new, and answer with all: the new tokens as they came, earlier ones as they are held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = dict(zip(HALVES, (key_states, value_states), strict=True))
        answer = {half: torch.cat([self._restored(half), states], dim=-2) for half, states in new.items()}
        self.own = {half: torch.cat([self.own[half], states], dim=-2) for half, states in new.items()}
        self.tokens += key_states.shape[-2]
        self.group.settle()
        return answer["keys"], answer["values"]

    def _restored(self, half: str) -> torch.Tensor:
        found = self._whole(half)
        assert found is not None
        return found

    def reset(self) -> None:
        self.group.reset()
        self.own, self.tokens, self.is_initialized = {}, 0, False

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.is_initialized:
            return
        before = self.own["keys"].shape[0]
        self.own = {half: change(tensor) for half, tensor in self.own.items()}
        self.token_size = self.token_size // before * self.own["keys"].shape[0]
        if not self.place:  # what the rows share is changed once
            self.group.each(change)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each(lambda tensor: tensor[indices, ...])
