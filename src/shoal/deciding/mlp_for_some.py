"""Children of a layer that run for all tokens and count for some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from shoal.deciding.decisions import Decision, weighted
from shoal.executing.checkpointed import Around
from shoal.models.parts import Parts, residual_place


@contextmanager
def mlp_for_some(layer: nn.Module, names: tuple[str, ...], active: torch.Tensor) -> Iterator[None]:
    """Meanwhile the children `names` of `layer` add something for the tokens that are `active` [batch, tokens] alone;
    where that is no bool, it is the weight of what they add.

    Several bare `nn.Linear` children are one chain (OPT keeps its mlp inline), of which the last one counts.
    """
    children = layer._modules
    saved = {name: children[name] for name in names}
    chain = len(names) > 1 and all(isinstance(child, nn.Linear) for child in saved.values())
    try:
        for name in names[-1:] if chain else names:
            children[name] = _Partly(saved[name], active)
        yield
    finally:
        children.update(saved)


def around_mlp(layer: nn.Module, parts: Parts | None, active: Decision | None, rows: int) -> tuple[Around, ...]:
    """What stands around a call in which the mlp of `layer` counts for the `active` tokens of so many rows; nothing
    where it does for all or for none."""
    if active is None or isinstance(active, bool):
        return ()
    assert parts is not None  # P105
    return (partial(mlp_for_some, layer, parts.mlp, active.expand(rows, -1)),)


class _Partly(nn.Module):
    """Stands for a child; a child that is handed the residual adds to it itself, so the residual is what it leaves."""

    def __init__(self, child: nn.Module | None, active: torch.Tensor) -> None:
        super().__init__()
        assert child is not None
        place = residual_place(child.forward)
        # past __setattr__, which would register the child: its parameters must not appear twice
        self.__dict__.update(_child=child, _active=active, _residual=place)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_child"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.__dict__["_child"](*args, **kwargs)
        added = out[0] if isinstance(out, tuple) else out
        place = self.__dict__["_residual"]
        nothing: Any = 0.0
        if place is not None:
            nothing = args[place] if len(args) > place else kwargs["residual"]
        active = self.__dict__["_active"].to(added.device)
        active = active.reshape(-1) if added.dim() == 2 else active
        if active.dtype == torch.bool:
            kept = torch.where(active[..., None], added, nothing)
        else:
            kept = weighted(active, added, torch.zeros_like(added) if place is None else nothing)
        return (kept, *out[1:]) if isinstance(out, tuple) else kept
