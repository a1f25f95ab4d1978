"""One pass over data, watching the attention map of each layer; no map outlives its call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.executing.bind import bind
from shoal.executing.inputs import require_whole, run_stack
from shoal.executing.recorder import Recorder
from shoal.models.evaluating import evaluating
from shoal.models.opened import OpenedModel, open_model

WatchMap = Callable[[int, torch.Tensor], None]
"""Called with the base layer and its map [batch, heads, queries, keys], in the order of execution."""


@torch.no_grad()
def observe_maps(
    model: nn.Module | OpenedModel,
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
    opened = open_model(model)
    require_whole(opened, what, stack)
    bound, seen = bind(opened), _Seen(watch)
    with evaluating(opened.model), _eager(opened.model), bound.running(), bound.executor(stack).recording(seen):
        for ids, mask in batches:
            before(ids, mask)
            run_stack(opened.model, opened.stack(stack), ids, mask)
            if not seen.maps:
                raise UsageError(
                    f"{what} needs attention maps, and {type(opened.model).__name__} hands out none even under "
                    "eager attention; use a measure of hidden states",
                    code="U537",
                )


class _Seen(Recorder):
    """Hands every map to a function, and counts them."""

    def __init__(self, watch: WatchMap) -> None:
        self.watch, self.maps = watch, 0

    def attends(self, layer: int, attention_map: torch.Tensor) -> None:
        self.maps += 1
        self.watch(layer, attention_map)


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
