"""What a graph is made of, and which models can be given one."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.executing.sharded import is_sharded
from shoal.models.describe import is_quantised


class Graph(ABC):
    """One way to compute the same on one model. Making it changes nothing."""

    def __init__(self, name: str, replaced: int, left: dict[str, str]) -> None:
        self.name = name
        self.replaced = replaced
        """How many modules compute otherwise."""
        self.left = left
        """Modules that were left as they are, by their path, and why."""

    @abstractmethod
    def put(self) -> None:
        """Put it on the model."""

    @abstractmethod
    def take_away(self) -> None:
        """Put every tensor back, bit for bit. Nothing happens where it is not on the model."""


def require_plain(model: nn.Module, name: str) -> None:
    """Raise `UsageError` U662 for a model whose matrices are not plain tensors in this process: quantised, sharded,
    offloaded, or with modules of peft around them."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")  # nobody can have wrapped a module before it was imported
    why = None
    if is_quantised(model):
        why = "quantised; load it in a float dtype"
    elif is_sharded(model):
        why = "spread over processes; use it on one device"
    elif any(p.is_meta for p in model.parameters()) or any("_hf_hook" in m.__dict__ for m in model.modules()):
        why = "offloaded by accelerate; load it whole"
    elif peft is not None and any(isinstance(module, peft.BaseTunerLayer) for module in model.modules()):
        why = "wrapped by peft; merge the adapter first (merge_and_unload)"
    if why is not None:
        raise UsageError(f"--graph {name} needs plain matrices, and this model is {why}", code="U662")


def nothing_fits(name: str, what: str, left: dict[str, str]) -> UsageError:
    """The refusal (U662) of a model in which `name` finds nothing to do."""
    why = next((f"; {path} is left as it is: {reason}" for path, reason in left.items()), "")
    return UsageError(f"--graph {name} finds no {what} in this model{why}; leave it out", code="U662")


def plain_linears(model: nn.Module) -> dict[int, tuple[str, nn.Linear]]:
    """Path and module of every `nn.Linear` whose forward is torch's own, by the identity of its weight. One whose
    weight has a second name in the model is left out."""
    names: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = names.get(id(parameter), 0) + 1
    return {
        id(module.weight): (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear and "forward" not in module.__dict__ and names[id(module.weight)] == 1
    }


def swap(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Let `parameter` hold `values` in place of its own, which are returned. It stays the same object."""
    before = parameter.data
    parameter.data = values
    return before
