"""How deep each token went, and what really ran: counted by hooks on the real layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shoal.models.examine import LayerFacts


@dataclass
class Counts:
    """Tokens x layers since the policy began to run, padding included."""

    layers: dict[int, int] = field(default_factory=dict)
    """By base layer: tokens for which the layer was called whole or in part."""
    attentions: dict[int, int] = field(default_factory=dict)
    mlps: dict[int, int] = field(default_factory=dict)
    """By base layer: tokens for which its attention, and its mlp, was called (layers whose parts are known)."""
    asked: float = 0.0
    """Tokens x layers that the policy asked for, halves for a layer without its mlp."""
    spared: float = 0.0
    """Tokens x layers by which calls with fewer neurons computed less than the whole layers that are counted."""
    late: int = 0
    """Tokens x layers of tokens that had left and whose layers ran later (the fill "defer")."""
    projected: int = 0
    """Tokens x layers of which only keys and values were computed (the fill "project"); not in `layers`."""
    heads: int = 0
    """Tokens for which norm and head ran at an exit to find out whether to leave."""
    tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data. `simulated`: tokens x layers that ran although the policy had skipped them, because another token
        of the same call needed the layer; `mean_depth`: layers per token as the policy decided, the
        prompt's tokens included."""
        halves = sum(self.attentions.values()) / 2 + sum(self.mlps.values()) / 2
        executed = sum(n for layer, n in self.layers.items() if layer not in self.mlps) + halves - self.spared
        return {
            "tokens": self.tokens,
            "mean_depth": self.asked / self.tokens if self.tokens else 0.0,
            "executed": executed,
            "asked": self.asked,
            "simulated": executed - self.asked - self.late,
            "late": self.late,
            "projected": self.projected,
            "heads": self.heads,
            "layers": {str(layer): n for layer, n in sorted(self.layers.items())},
        }


@dataclass
class Trace:
    """Of the sequences that are being written: the tokens that went in and how many layers each ran, row by row.

    The two have equal length: `depths[row][column]` belongs to `tokens[row][column]`, the token that was read there;
    padding has depth 0. `layers` is the number of layers of the plan when nothing is skipped.
    """

    layers: float = 0.0
    tokens: list[list[int]] = field(default_factory=list)
    depths: list[list[float]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and for a page."""
        return {
            "layers": self.layers, "tokens": self.tokens, "depths": self.depths, "counts": self.counts.to_dict()
        }  # fmt: skip

    def begin(self, past: int, rows: int) -> None:
        """A forward behind `past` columns begins; what was cropped, or written before an empty cache, is gone."""
        for name in ("tokens", "depths"):
            kept: list[list[Any]] = [row[:past] for row in getattr(self, name)]
            if len(kept) != rows:
                kept = [[] for _ in range(rows)]
            setattr(self, name, [row + [0] * (past - len(row)) for row in kept])

    def end(self, ids: torch.Tensor | None, depths: torch.Tensor, real: torch.Tensor | None) -> None:
        """The forward is over: `ids` and `depths` [batch, tokens]."""
        if real is not None:
            depths = depths * real.to(depths)
        self.depths = [old + new for old, new in zip(self.depths, depths.tolist(), strict=True)]
        read = ids.tolist() if ids is not None else [[-1] * depths.shape[1]] * depths.shape[0]
        self.tokens = [old + new for old, new in zip(self.tokens, read, strict=True)]


def count_calls(
    layers: Iterable[tuple[int, nn.Module]], facts: list[LayerFacts], counts: Counts, paused: Callable[[], bool]
) -> Callable[[], None]:
    """Hooks on every layer, given with its base index, and on its parts, that fill `counts` while nothing is `paused`;
    the answer takes them away."""
    handles = []
    for index, layer in layers:
        parts = facts[index].parts
        handles.append(layer.register_forward_hook(_counting(counts.layers, index, paused), with_kwargs=True))
        if parts is not None:
            for of, names in ((counts.attentions, parts.attention), (counts.mlps, parts.mlp)):
                of[index] = 0
                child = layer.get_submodule(names[0])
                handles.append(child.register_forward_hook(_counting_part(of, index, paused), with_kwargs=True))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _counting(counts: dict[int, int], index: int, paused: Callable[[], bool]) -> Callable[..., None]:
    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        if paused():
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        counts[index] = counts.get(index, 0) + hidden.shape[-3] * hidden.shape[-2]

    return count


def _counting_part(counts: dict[int, int], index: int, paused: Callable[[], bool]) -> Callable[..., None]:
    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        state = next((given for given in (*args, *kwargs.values()) if isinstance(given, torch.Tensor)), None)
        if state is not None and not paused():
            counts[index] += state.shape[:-1].numel()

    return count
