"""One pass over data, watching the attention map of each layer; no map outlives its call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.models.evaluating import evaluating
from shoal.models.opened import open_model
from shoal.models.parts import find_parts
from shoal.models.stacks import unwrap
from shoal.recording.observe import forward_without_head, require_whole

WatchMap = Callable[[int, torch.Tensor], None]
"""Called with the base layer and its map [batch, heads, queries, keys], in the order of execution."""


@torch.no_grad()
def observe_maps(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    watch: WatchMap,
    *,
    what: str,
    before: Callable[[torch.Tensor, torch.Tensor | None], None],
    stack: str | None = None,
) -> None:
    """Run `model` without its head on every batch of (ids, mask), [batch, length] each, under eager attention, which
    alone makes its maps, and call `watch` at each layer that has attention.

    The maps are taken where the attention modules return them, one layer at a time. Raises U537, naming the measure
    `what`, for a model whose attention returns none; U507 while a plan is running.
    """
    require_whole(model, what, stack)
    inner = unwrap(model)
    found = open_model(inner).stack(stack)
    handles, seen = [], 0

    def hook(index: int) -> Callable[..., None]:
        def made(_: nn.Module, __: Any, out: Any) -> None:
            nonlocal seen
            attended = out[1] if isinstance(out, tuple) and len(out) > 1 else None
            if isinstance(attended, torch.Tensor) and attended.dim() == 4 and attended.is_floating_point():
                seen += 1
                watch(index, attended)

        return made

    try:
        for index in range(found.depth):
            parts = find_parts(found.layer(index))
            if parts is not None:
                module = found.layer(index).get_submodule(parts.attention[0])
                handles.append(module.register_forward_hook(hook(index)))
        with evaluating(inner), _eager(inner):
            for ids, mask in batches:
                before(ids, mask)
                forward_without_head(inner, ids, mask)
                if not seen:
                    raise UsageError(
                        f"{what} needs attention maps, and {type(inner).__name__} hands out none even under eager "
                        "attention; use a measure of hidden states",
                        code="U537",
                    )
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Attention that writes its maps down; afterwards every config asks for what it asked for before."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = {key: getattr(c, "_attn_implementation_internal", None) for key, c in configs.items()}
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        for key, config in configs.items():
            if getattr(config, "_attn_implementation_internal", None) != before[key]:
                config._attn_implementation_internal = before[key]
