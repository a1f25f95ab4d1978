"""What a model makes of a given hidden state behind its last layer: final norm, head, and whatever stands around."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from shoal.executing.live import running
from shoal.models.opened import open_model
from shoal.plan import Plan, check, keep


@contextmanager
def ending_with(model: nn.Module, stack: str | None = None) -> Iterator[Callable[[torch.Tensor | None], None]]:
    """Meanwhile every forward of `model` ends with the hidden state that was last given, as its layers hand it on.

    Only one layer runs, where the plan of that layer alone is legal, and its output is replaced; otherwise all run and
    the last one's is. `None` gives the forward its own state back.
    """
    found, spec = open_model(model).stack(stack), open_model(model).spec
    alone = keep(Plan.identity(spec), [0], stack=stack)
    short = not check(alone, spec)
    given: torch.Tensor | None = None

    def give(state: torch.Tensor | None) -> None:
        nonlocal given
        given = state

    def replaced(_: nn.Module, __: Any, out: Any) -> Any:
        if given is None:
            return out
        return (given, *out[1:]) if isinstance(out, tuple) else given

    handle = found.layer(0 if short else found.depth - 1).register_forward_hook(replaced)
    try:
        with running(model, alone) if short else nullcontext():
            yield give
    finally:
        handle.remove()


@contextmanager
def recorded(model: nn.Module, stack: str | None = None) -> Iterator[dict[int, torch.Tensor]]:
    """Meanwhile the raw output of each layer that runs is kept, by base layer, as the layer hands it on."""
    found = open_model(model).stack(stack)
    outputs: dict[int, torch.Tensor] = {}

    def hook(index: int) -> Callable[..., None]:
        def seen(_: nn.Module, __: Any, out: Any) -> None:
            outputs[index] = out[0] if isinstance(out, tuple) else out

        return seen

    handles = [found.layer(index).register_forward_hook(hook(index)) for index in range(found.depth)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
