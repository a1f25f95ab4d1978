"""The attention of a layer that reads a later one: each token sees the tokens before it, and never itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shoal.errors import PlanError
from shoal.executing.attention_maps import Attend, additive, attention_of, home_of, takes_attention
from shoal.executing.fewer_heads import repeated
from shoal.executing.slots import KeysValues
from shoal.plan import Run, Step
from shoal.plan.later import later_sources
from shoal.plan.sources import LayerKV


@dataclass(frozen=True)
class Seen:
    """What readers of one source attend to in one pass."""

    states: KeysValues
    begin: Any
    """The column at which the new tokens begin, a number or a tensor of one."""
    new: bool
    """Whether the columns of the new tokens hold anything: in the first pass they do not."""


def tokens_before(layer: nn.Module, run: Run, seen: Callable[[], Seen]) -> Attend:
    """An attention in which each token sees those before it alone, and adds nothing where there is none.

    `seen`: what the layer attends to, known once it is called. Raises P163 beside flash and other fused kernels.
    """
    attention: Any = attention_of(layer)
    own: str = attention.config._attn_implementation
    if own not in ("eager", "sdpa"):
        raise PlanError(
            f"{own} takes no mask of its own for layer {run.layer}, which reads the KV of a layer that runs later; "
            "load the model with sdpa or eager attention",
            code="P163",
        )

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        key, value = (repeated(module, query, one.to(query.device, query.dtype)) for one in (key, value))
        may, any_seen = _before(mask, query, key, seen())
        if mask is not None and mask.dtype != torch.bool:
            may = mask[..., : key.shape[-2]].masked_fill(~may, torch.finfo(mask.dtype).min)
        if own == "sdpa":
            out, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, may, **options)
        else:
            eager = home_of(module).eager_attention_forward
            out, weights = eager(module, query, key, value, additive(module, may, query, key), **options)
        return out.masked_fill(~any_seen.transpose(1, 2), 0), weights

    return attend


def _before(mask: Any, query: torch.Tensor, key: torch.Tensor, seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys each query may see, [batch, heads, queries, keys], and whether it sees any, [batch, heads, queries,
    1]; one that sees none is given itself, so that no kernel meets an empty row."""
    tokens, keys = query.shape[-2], key.shape[-2]
    columns = torch.arange(keys, device=query.device)
    itself = (seen.begin + torch.arange(tokens, device=query.device)).unsqueeze(-1)
    may = (columns < (itself if seen.new else itself[:1]))[None, None]
    if mask is not None:
        shown = mask[..., :keys]
        may = may & (shown if shown.dtype == torch.bool else shown > torch.finfo(shown.dtype).min / 2)
    may = may.expand(*may.shape[:2], tokens, keys)
    any_seen = may.any(-1, keepdim=True)
    return may | (~any_seen & (columns == itself)), any_seen


def refuse_unmaskable(steps: tuple[Step, ...], layer: Callable[[int], Any]) -> None:
    """Raise P163 for a run that reads a later layer, in a layer whose attention does not go through transformers'
    interface. `layer`: the model's by its base index."""
    for _, run, source in later_sources(steps):
        if isinstance(source, LayerKV) and not takes_attention(layer(run.layer)):
            raise PlanError(
                f"no way is known to the mask of the attention of layer {run.layer} "
                f"({type(layer(run.layer)).__name__}), which reads the KV of layer {source.layer}, that runs later; "
                "name an earlier layer",
                code="P163",
            )
