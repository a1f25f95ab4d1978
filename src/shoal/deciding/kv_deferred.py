"""Tokens that left early and whose remaining layers run later, in one batch with the next token that goes deeper.

For every token behind them the KV cache is then the one of the whole model. What waits in a layer are always the newest
columns: a token that runs a layer first lets all those run it that wait there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache, StaticLayer

from shoal.deciding.forward import GatedForward
from shoal.deciding.layer_arguments import Arguments
from shoal.deciding.masks import causal, seen_columns
from shoal.errors import PlanError
from shoal.executing.calls import Call, argument, with_argument
from shoal.executing.slots import KeysValues, Store, Take


@dataclass
class WaitingTokens:
    """The tokens of one forward that all left."""

    start: int
    """Their first column."""
    state: torch.Tensor
    """[..., batch, tokens, hidden]: their input of the step they wait at."""
    at: int
    """The position of that step in the plan."""
    arguments: Arguments
    calls: dict[int, Call] = field(default_factory=dict)
    """What each layer that they skipped was called with."""

    @property
    def tokens(self) -> int:
        return int(self.state.shape[-2])

    def cropped(self, length: int) -> WaitingTokens | None:
        """What is left when the cache is cropped to `length` columns."""
        kept = min(self.tokens, length - self.start)
        if kept <= 0:
            return None
        calls = {layer: self.arguments.cut(layer, call, kept) for layer, call in self.calls.items()}
        return replace(self, state=self.state[..., :kept, :], calls=calls)


def wait(forward: GatedForward, position: int, layer: int, hidden: torch.Tensor, call: Call, known: Arguments) -> None:
    """The tokens of this forward skip the step at `position`, which calls `layer`: remember how to run it."""
    waiting, past = forward.kv_state.waiting, forward.view.past
    block = waiting[-1] if waiting else None
    if block is None or block.start != past:
        block = WaitingTokens(past, hidden, position, known)
        waiting.append(block)
    args, kwargs = call
    block.calls[layer] = (
        tuple(None if n == 0 or isinstance(a, Cache) else a for n, a in enumerate(args)),
        {k: None if k == "hidden_states" or isinstance(v, Cache) else v for k, v in kwargs.items()},
    )


@dataclass
class DeferredRun:
    """One run over those who wait for it and the tokens of this forward."""

    blocks: list[WaitingTokens]
    hidden: torch.Tensor
    call: Call
    take: Take

    @property
    def tokens(self) -> int:
        """Of those who waited."""
        return sum(block.tokens for block in self.blocks)

    def part(self, out: torch.Tensor, following: int) -> torch.Tensor:
        """The output for this forward's own tokens; the others wait at the step `following` with theirs."""
        start = 0
        for block in self.blocks:
            block.state = out[..., start : start + block.tokens, :]
            block.at = following
            start += block.tokens
        return out[..., start:, :]


def catch_up(
    position: int, slot: int, layer: int, forward: GatedForward, known: Arguments, call: Call, hidden: torch.Tensor
) -> DeferredRun | None:
    """How to run the step at `position` so that all who wait there run it too; None when nobody does.

    Raises P137 for a cache whose entries cannot be replaced.
    """
    blocks = [block for block in forward.kv_state.waiting if block.at == position]
    if not blocks:
        return None
    past, tokens = forward.view.past, forward.view.tokens
    late = sum(block.tokens for block in blocks)
    start = past - late
    joined = known.joined(layer, [*(_like(block.calls[layer], call) for block in blocks), call])
    at = known.masks[layer]
    assert at is not None  # P137 was raised before anything ran
    mask = causal(
        argument(call, at),
        start=start,
        tokens=late + tokens,
        keys=seen_columns(forward.cache, slot, tokens)[0],
        boolean=known.boolean[layer],
        like=hidden,
    )
    row = _row(forward.cache, slot)
    forward.kv_state.unmark(slot, start, past)

    def take(store: Store, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        with torch.no_grad():
            row.keys[:, :, start:past] = keys[:, :, :late]
            row.values[:, :, start:past] = values[:, :, :late]
        return store(keys[:, :, late:], values[:, :, late:])

    states = torch.cat([*(block.state for block in blocks), hidden], -2)
    return DeferredRun(blocks, states, with_argument(joined, at, mask), take)


def _like(old: Call, new: Call) -> Call:
    """`old` with the arguments that only `new` has."""
    args, kwargs = new
    return (*old[0], *args[len(old[0]) :]), kwargs | old[1]


def _row(cache: Cache | None, slot: int) -> DynamicLayer:
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    assert cache is not None
    row = cache.layers[slot]
    if type(row) not in (DynamicLayer, StaticLayer):
        raise PlanError(
            f"the fill defer replaces entries of the KV cache, which a {type(row).__name__} does not allow; use "
            "project, or a dynamic or static cache",
            code="P137",
        )
    return row
