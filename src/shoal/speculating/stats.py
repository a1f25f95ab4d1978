"""Statistics of a generation: tokens drafted and accepted, layers that really ran, and where the time went."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shoal.executing.timing import synchronized_time
from shoal.models.examine import LayerFacts
from shoal.models.stacks import Stack

PHASES = ("prefill", "draft", "choose", "verify")
"""`choose` is what a draft that is chosen on the fly pays for choosing."""
CLOSE = 1e-4
"""Two logits nearer than this may change places between a pass over one token and a pass over several."""


@dataclass
class Stats:
    """Counts and seconds of one generation."""

    prompt: int = 0
    """Tokens of the prompt."""
    tokens: int = 0
    """New tokens, the first one (from the prefill) included."""
    rounds: int = 0
    """Verifications: forward passes of the base model behind the prefill, drafted tokens before them or not."""
    drafted: int = 0
    """Of a tree every token counts, and one at most of each level can stand."""
    accepted: int = 0
    looked_up: int = 0
    """Of the drafted, those that came from prompt lookup."""
    close_calls: int = 0
    """Greedy choices whose two best logits were less than 1e-4 apart: only there may rounding choose another token."""
    depth: int = 0
    shared: int = 0
    """Layers that draft and verification had in common, in the last draft."""
    draft: str = ""
    """The last draft's steps in depth notation, or lookup."""
    layers: dict[str, list[int]] = field(default_factory=dict)
    """Phase -> for each base layer the tokens that went through it, counted by hooks."""
    attentions: dict[str, list[int]] = field(default_factory=dict)
    mlps: dict[str, list[int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*PHASES, "rest"), 0.0))

    @property
    def acceptance(self) -> float | None:
        """Accepted over drafted tokens; None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float | None:
        """New tokens for each verification; the first token comes from the prefill and does not count."""
        return (self.tokens - 1) / self.rounds if self.rounds else None

    @property
    def layers_per_token(self) -> float | None:
        """Layers run for each token behind the first one, drafting and choosing included; plain decoding: the depth.

        A layer without its mlp or its attention counts as a layer; `attentions` and `mlps` tell them apart.
        """
        if self.tokens < 2 or not self.layers:
            return None
        return sum(sum(self.layers[phase]) for phase in PHASES[1:]) / (self.tokens - 1)

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens behind the first one for each second behind the prefill."""
        spent = sum(self.seconds.values()) - self.seconds["prefill"]
        return (self.tokens - 1) / spent if spent else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        derived = ("acceptance", "tokens_per_round", "layers_per_token", "tokens_per_second")
        return {name: getattr(self, name) for name in (*self.__dataclass_fields__, *derived)}


class PhaseProfiler:
    """Adds up time and layer calls for each phase of a generation."""

    def __init__(self, stats: Stats, device: torch.device) -> None:
        self.stats, self.device = stats, device
        self.phase = "rest"
        self.since = self._now()

    @contextmanager
    def on(self, phase: str) -> Iterator[None]:
        """Count time and layer calls inside the block for `phase`."""
        before = self._switch(phase)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, phase: str) -> str:
        now, before = self._now(), self.phase
        self.stats.seconds[before] += now - self.since
        self.phase, self.since = phase, now
        return before

    def close(self) -> None:
        """Count the time since the last phase ended."""
        self._switch("rest")

    def _now(self) -> float:
        return synchronized_time(self.device)

    @contextmanager
    def counting(self, stack: Stack, facts: list[LayerFacts]) -> Iterator[None]:
        """Count tokens through every layer, and through its attention and mlp where these are known."""
        for table in (self.stats.layers, self.stats.attentions, self.stats.mlps):
            table.update({phase: [0] * stack.depth for phase in (*PHASES, "rest")})
        handles = []
        try:
            for index in range(stack.depth):
                layer, parts = stack.layer(index), facts[index].parts
                handles.append(_count(self, layer, self.stats.layers, index))
                if parts is not None:
                    handles.append(_count(self, layer.get_submodule(parts.attention[0]), self.stats.attentions, index))
                    handles.append(_count(self, layer.get_submodule(parts.mlp[-1]), self.stats.mlps, index))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _count(profiler: PhaseProfiler, module: nn.Module, table: dict[str, list[int]], index: int) -> Any:
    def counted(_: nn.Module, __: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple | list) else out
        table[profiler.phase][index] += hidden.shape[-2]

    return module.register_forward_hook(counted)
