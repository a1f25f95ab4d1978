"""What stands in for a model's list of layers while a plan runs: the stock loop meets proxies in place of layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, Protocol

from torch import nn

from shoal.errors import PlanError
from shoal.models.lists import Stack


class ProxyTarget(Protocol):
    """What runs the layers that the proxies stand for."""

    def layer(self, index: int) -> Any:
        """The real layer."""

    def proxy_call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the stock loop is given in place of the answer of layer `index`."""


class LayerProxyList(nn.ModuleList):
    """Stands in for a model's list of layers: the same children under the same names, but iterating yields proxies."""

    is_proxy_list = True
    """Tells it from a model's own list, see `shoal.models.opened`."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self._modules = stack.layers._modules  # shared: what PEFT or accelerate change later is seen here too
        self.__dict__.update(_proxies=[], _others={})

    def attach(self, executor: ProxyTarget) -> None:
        """From now on calls of the proxies go to `executor`."""
        self.__dict__["executor"] = executor
        self.__dict__["_proxies"] = [LayerProxy(executor, i) for i in range(len(self._modules))]

    def real(self, index: int, stack: str | None = None) -> Any:
        """The real layer of this stack, or of another one that stands `beside` it."""
        return (self if stack is None else self.__dict__["_others"][stack])._modules[str(index)]

    def beside(self, others: Mapping[str, LayerProxyList]) -> None:
        """The stand-ins for the other stacks of the model, by name."""
        self.__dict__["_others"] = dict(others)

    @property
    def executor(self) -> Any:
        """What runs the layers that the proxies stand for."""
        return self.__dict__["executor"]

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerProxyList:
        """A copy of the model runs a copy of the plan."""
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise PlanError(
            "a plan is running on this model, and a pickle could not hold it; restore the model first, or save its "
            "state_dict()",
            code="P147",
        )

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise PlanError(
            "DataParallel would run the layers of the first device in all its threads; start one process for each "
            "device with torchrun",
            code="P155",
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__["_proxies"])

    def __getitem__(self, index: Any) -> Any:
        return self.__dict__["_proxies"][index]


class LayerProxy:
    """Stands for one base layer in the stock loop; anything but calling it reaches the real layer."""

    def __init__(self, executor: ProxyTarget, index: int) -> None:
        self.executor, self.index = executor, index

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy asks for these before there is an executor
            raise AttributeError(name)
        return getattr(self.executor.layer(self.index), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.executor.proxy_call(self.index, args, kwargs)
