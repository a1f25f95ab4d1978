"""One pass over data, watching the keys and values that each layer stores."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.executing.bind import bind
from shoal.executing.inputs import require_whole, run_stack
from shoal.executing.recorder import Recorder
from shoal.models.evaluating import evaluating
from shoal.models.opened import OpenedModel, open_model
from shoal.plan import Run

WatchKV = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with the base layer, its keys and its values, [batch, heads, tokens, dim] each, in the order of execution."""


@torch.no_grad()
def observe_kv(
    model: nn.Module | OpenedModel,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    watch: WatchKV,
    *,
    what: str,
    before: Callable[[torch.Tensor, torch.Tensor | None], None],
    stack: str | None = None,
) -> None:
    """Run `model` without its head on every batch of (ids, mask), [batch, length] each, and call `watch` at each layer
    that stores keys and values, as its cache would hold them: rotated, and without repeated heads.

    Raises U537, naming the measure `what`, for a model in which no layer stores any; U507 while a plan is running.
    """
    opened = open_model(model)
    require_whole(opened, what, stack)
    name = opened.stack(stack).name
    if all(fact.keys is None for fact in opened.facts(name).layers):
        raise UsageError(
            f"{what} needs keys and values, and no layer of the {name} of {type(opened.model).__name__} stores any; "
            "use a measure of hidden states",
            code="U537",
        )
    bound, seen = bind(opened), _Seen(watch)
    with evaluating(opened.model), bound.running(), bound.executor(stack).recording(seen):
        for ids, mask in batches:
            before(ids, mask)
            seen.layers.clear()
            run_stack(opened.model, opened.stack(stack), ids, mask)


class _Seen(Recorder):
    """Hands on what each layer stores first: its self-attention's, before what a cross-attention makes of the
    encoder."""

    def __init__(self, watch: WatchKV) -> None:
        self.watch = watch
        self.layers: set[int] = set()
        """Those that stored something in this batch."""

    def stores(self, run: Run, keys: torch.Tensor, values: torch.Tensor) -> None:
        if run.layer not in self.layers:
            self.layers.add(run.layer)
            self.watch(run.layer, keys, values)
