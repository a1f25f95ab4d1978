"""What stands in for a model's list of layers while a plan runs: the stock loop meets taps in place of layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from shoal.models.lists import Stack


class Taken(Protocol):
    """Who runs what the taps are asked for."""

    def layer(self, index: int) -> Any:
        """The real layer."""

    def tap(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the stock loop is given in place of the answer of layer `index`."""


class PlannedList(nn.ModuleList):
    """Stands in for a model's list of layers: the same children under the same names, but iterating yields taps."""

    stands_in = True
    """What tells it from a model's own list, see `shoal.models.opened`."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self._modules = stack.layers._modules  # shared: what PEFT or accelerate change later is seen here too
        self.__dict__["_taps"] = []

    def lead_to(self, executor: Taken) -> None:
        """From now on `executor` runs what the taps are asked for."""
        self.__dict__["executor"] = executor
        self.__dict__["_taps"] = [Tap(executor, i) for i in range(len(self._modules))]

    @property
    def executor(self) -> Any:
        """Who runs what the taps are asked for."""
        return self.__dict__["executor"]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__["_taps"])

    def __getitem__(self, index: Any) -> Any:
        return self.__dict__["_taps"][index]


class Tap:
    """Stands for one base layer in the stock loop; anything but calling it reaches the real layer."""

    def __init__(self, executor: Taken, index: int) -> None:
        self.executor, self.index = executor, index

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy asks for these before there is an executor
            raise AttributeError(name)
        return getattr(self.executor.layer(self.index), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.executor.tap(self.index, args, kwargs)
