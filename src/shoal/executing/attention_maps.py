"""The attention map of one layer, made during its call and taken over by a later one.

While such a layer is called, its attention module has a copy of its config that asks transformers for an attention
function of ours. It is given queries, keys and values behind rotation and cache. To make a map it calls the family's
own eager function, so that scales, soft caps and sinks are right; to take one it multiplies it with the layer's values.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shoal.errors import PlanError
from shoal.executing.fewer_heads import repeated
from shoal.models.parts import INDEX_NAMES

NAME = "shoal_shared_map"
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""(module, query, key, value, mask, **options), each [batch, heads, tokens, size], to the output [batch, tokens, heads,
size] and the map [batch, heads, queries, keys]."""


def require_maps(layer: nn.Module, index: int) -> None:
    """Raise P141 for a layer whose attention hands out no map and takes none."""
    if not takes_attention(layer):
        raise PlanError(
            f"no way is known to an attention map of layer {index} ({type(layer).__name__}); write the plan without @a",
            code="P141",
        )


@contextmanager
def attending(layer: nn.Module, attend: Attend) -> Iterator[None]:
    """Meanwhile the attention of `layer` computes with `attend`. Raises P141 beside flash and other fused kernels."""
    module: Any = attention_of(layer)
    own = module.config
    if own._attn_implementation not in ("eager", "sdpa"):
        raise PlanError(
            f"{own._attn_implementation} hands out no attention map and takes no other number of heads; load the model "
            "with sdpa or eager attention, or write the plan without @a and narrower tensors",
            code="P141",
        )
    stand_in = copy.copy(own)
    stand_in.__dict__.update(_attn_implementation_internal=NAME, _shoal_attend=attend, _shoal_own=own)
    module.config = stand_in
    try:
        yield
    finally:
        module.config = own


def is_attending(layer: nn.Module) -> bool:
    """Whether the attention of the layer computes with a function of ours at the moment."""
    module: Any = attention_of(layer)
    return module is not None and "_shoal_attend" in module.config.__dict__


def made(keep: Callable[[torch.Tensor], None]) -> Attend:
    """The family's own eager attention, whose map is given to `keep`."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        eager = home_of(module).eager_attention_forward
        key, value = (repeated(module, query, one) for one in (key, value))
        out, weights = eager(module, query, key, value, additive(module, mask, query, key), **options)
        keep(weights)
        return out, weights

    return attend


def over_fewer_heads(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """The model's own attention, over keys and values of fewer heads than the module expects."""
    own = module.config._shoal_own._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get_interface(own, home_of(module).eager_attention_forward)
    return function(module, query, repeated(module, query, key), repeated(module, query, value), mask, **options)


def taken(weights: torch.Tensor) -> Attend:
    """The values of a layer, weighed with the map of another one."""

    def attend(_: Any, __: Any, ___: Any, value: torch.Tensor, *____: Any, **_____: Any) -> Any:
        values = value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
        return (weights.to(values) @ values).transpose(1, 2).contiguous(), weights

    return attend


def _called(module: Any, *args: Any, **options: Any) -> Any:
    return module.config._shoal_attend(module, *args, **options)


ALL_ATTENTION_FUNCTIONS.register(NAME, _called)


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The one module of the layer that knows its place and has a config, the innermost where one is within another."""
    found = [m for m in layer.modules() if "config" in m.__dict__ and any(name in m.__dict__ for name in INDEX_NAMES)]
    inner = [m for m in found if not any(other is not m and other in set(m.modules()) for other in found)]
    return inner[0] if len(inner) == 1 else None


def takes_attention(layer: nn.Module) -> bool:
    """Whether the attention of the layer goes through transformers' interface, and so takes a function of ours."""
    module = attention_of(layer)
    return module is not None and hasattr(home_of(module), "eager_attention_forward")


def home_of(module: nn.Module) -> Any:
    """The file of the family, where its own eager attention is."""
    return sys.modules[type(module).__module__]


def additive(module: Any, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """A mask as eager attention takes it; sdpa is given none where causal order alone counts, or a boolean one."""
    if mask is None:
        tokens, keys = query.shape[-2], key.shape[-2]
        if tokens == 1 or not getattr(module, "is_causal", True):
            return None
        # as sdpa does: the first query sees the first key alone; places of a static cache that are not filled come last
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril()
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
        ~mask, torch.finfo(query.dtype).min
    )
