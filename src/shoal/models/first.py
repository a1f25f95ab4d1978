"""What only the first layer of a stack owns, and how another layer takes its place (T5's relative position bias)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from shoal.models.families import family_of
from shoal.models.lists import Stack


@dataclass(frozen=True)
class FirstOnly:
    """A child `attr` of the submodule `owner` that layer 0 has and no other layer."""

    layer: nn.Module
    owner: str
    attr: str

    @property
    def module(self) -> nn.Module:
        """The child itself."""
        return self.layer.get_submodule(f"{self.owner}.{self.attr}")

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with, inside a layer."""
        return f"{self.owner}.{self.attr}."

    @contextmanager
    def shared_with(self, layer: nn.Module) -> Iterator[None]:
        """Until the end of the block `layer` owns it too, beside layer 0. Families say by a flag `has_...` whether
        a layer owns it."""
        source, target = self.layer.get_submodule(self.owner), layer.get_submodule(self.owner)
        flag = f"has_{self.attr}"
        had = getattr(target, flag, None)
        target._modules[self.attr] = source._modules[self.attr]
        setattr(target, flag, True)
        try:
            yield
        finally:
            del target._modules[self.attr]
            setattr(target, flag, had)

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Until the end of the block layer 0 is without it, as it is in a stock model where it does not come first."""
        owner, flag = self.layer.get_submodule(self.owner), f"has_{self.attr}"
        had = owner._modules.pop(self.attr)
        setattr(owner, flag, False)
        try:
            yield
        finally:
            owner._modules[self.attr] = had
            setattr(owner, flag, True)


def first_only(stack: Stack) -> FirstOnly | None:
    """What the family file says only layer 0 owns; None when there is nothing, or every layer has its own."""
    attr = family_of(stack.config).first_owns
    if attr is None:
        return None
    owners = [name for name, module in stack.layer(0).named_modules() if attr in module._modules]
    if len(owners) != 1 or (stack.depth > 1 and _has(stack.layer(1), owners[0], attr)):
        return None
    return FirstOnly(stack.layer(0), owners[0], attr)


def _has(layer: nn.Module, owner: str, attr: str) -> bool:
    return attr in layer.get_submodule(owner)._modules
