"""The attention and the mlp of a layer, found by probing and proved by stubbing both: the layer must do nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shoal.models.calls import class_function

Makes = Callable[[torch.Tensor], torch.Tensor]
"""What is added to the state in a child's place, from the child's input."""
INDEX_NAMES = ("layer_idx", "layer_id", "layer_number")
"""What families call the attribute by which an attention module knows its place."""


@dataclass(frozen=True)
class Parts:
    """Names of the child modules that make up the attention (or recurrent mixer) and the mlp of one layer."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]


def find_parts(layer: nn.Module, by_name: bool = False) -> Parts | None:
    """Split a layer's children: the attention holds the module that knows its place, norms belong to neither, the
    rest is the mlp. None when one of the two is missing, as in layers that are only a mixer.

    `by_name`: where no module knows its place, as in encoders that keep no cache, the attention is called so."""
    attention, mlp = [], []
    indexed = {name for name, child in layer.named_children() if _knows_its_place(child)}
    if not indexed and by_name:
        indexed = {name for name, child in layer.named_children() if "attention" in type(child).__name__.lower()}
    for name, child in layer.named_children():
        if name in indexed:
            attention.append(name)
        elif any(p.dim() >= 2 for p in child.parameters()):
            mlp.append(name)
    return Parts(tuple(attention), tuple(mlp)) if len(attention) == 1 and mlp else None


def _knows_its_place(module: nn.Module) -> bool:
    return any(index in one.__dict__ for one in module.modules() for index in INDEX_NAMES)


def stubs(
    layer: nn.Module, names: tuple[str, ...], returns: Mapping[str, int], makes: Makes | None = None
) -> dict[str, nn.Module]:
    """For each of the children `names` of `layer` what stands for it while it contributes nothing, or only what `makes`
    makes of its input.

    `returns` says how many values each child returns besides its tensor (-1: a bare tensor). Several bare `nn.Linear`
    children are one chain (OPT keeps fc1 and fc2 inline): the last contributes and the others hand their input on.
    """
    children = {name: layer._modules[name] for name in names}
    chain = len(names) > 1 and all(isinstance(child, nn.Linear) for child in children.values())
    return {
        name: _Stub(child, returns.get(name, -1), chain and name != names[-1], makes)
        for name, child in children.items()
    }


@contextmanager
def without(layer: nn.Module, names: tuple[str, ...], returns: dict[str, int]) -> Iterator[None]:
    """Run `layer` while the children `names` contribute nothing, see `stubs`."""
    with _in_place(layer, stubs(layer, names, returns)):
        yield


def reads_attention(
    layer: nn.Module, parts: Parts, returns: Mapping[str, int], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether the mlp of `layer` reads what its attention wrote, rather than both the same input.

    Two calls show it, in which the attention writes something else; on the meta device, where there are no values, the
    graph that autograd keeps of a call. `args`, `kwargs`: what the layer is called with.
    """
    given = next(one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor))
    read: list[torch.Tensor] = []

    def called(writes: Makes) -> list[torch.Tensor]:
        made = stubs(layer, parts.attention, returns, writes) | stubs(layer, parts.mlp, returns, reads)
        read.clear()
        with _in_place(layer, made):
            layer(*args, **kwargs)
        return list(read)

    def reads(x: torch.Tensor) -> torch.Tensor:
        read.append(x)
        return torch.zeros_like(x)

    if not given.is_meta:
        pairs = zip(called(torch.zeros_like), called(_slope), strict=True)
        return any(not torch.equal(one, other) for one, other in pairs)
    leaf = torch.zeros_like(given, requires_grad=True)
    with torch.enable_grad():
        return any(_is_made_of(one, leaf) for one in called(lambda x: leaf.expand_as(x) + 0))


def _slope(x: torch.Tensor) -> torch.Tensor:
    """What no norm makes the same as zeros."""
    return torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype).expand_as(x)


def _is_made_of(made: torch.Tensor, leaf: torch.Tensor) -> bool:
    nodes, seen = [made.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
    return any(getattr(node, "variable", None) is leaf for node in seen)


@contextmanager
def _in_place(layer: nn.Module, made: Mapping[str, nn.Module]) -> Iterator[None]:
    children = layer._modules
    saved = {name: children[name] for name in made}
    try:
        children.update(made)
        yield
    finally:
        children.update(saved)


class _Stub(nn.Module):
    """Stands for a child that adds nothing, or what `makes` makes of its input.

    A child that is handed the residual adds to it itself: it gets it back.
    """

    def __init__(self, child: nn.Module | None, extra: int, passes: bool, makes: Makes | None = None) -> None:
        super().__init__()
        assert child is not None
        self._residual = residual_place(child.forward)
        self._extra, self._passes, self._makes = extra, passes, makes
        self.__dict__["_child"] = child  # not registered: its parameters must not appear twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_child"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, torch.Tensor))
        if self.__dict__["_passes"]:
            return x
        place, makes = self.__dict__["_residual"], self.__dict__["_makes"]
        if place is not None:
            out = args[place] if len(args) > place else kwargs["residual"]
            out = out if makes is None else out + makes(x)
        else:
            out = torch.zeros_like(x) if makes is None else makes(x)
        extra = self.__dict__["_extra"]
        return out if extra < 0 else (out, *[None] * extra)


_PLACES: dict[Callable[..., Any], int | None] = {}
"""A plain dictionary, since torch.compile looks through `functools.cache` and warns of it."""


def residual_place(forward: Callable[..., Any]) -> int | None:
    """The place of the residual among the arguments after `self`; asked for in every pass, so it is remembered."""
    key = class_function(forward)
    if key is None:
        return _place_in(forward)
    if key not in _PLACES:
        _PLACES[key] = _place_in(forward)
    return _PLACES[key]


def _place_in(forward: Callable[..., Any]) -> int | None:
    parameters = [name for name in inspect.signature(forward).parameters if name != "self"]
    return parameters.index("residual") if "residual" in parameters else None


def built_alike(layer: nn.Module) -> Hashable:
    """What two layers have in common that are built alike, whatever their place."""
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    held = (item for module in layer.modules() for item in vars(module).items() if item[0] not in INDEX_NAMES)
    return type(layer), shapes, tuple((name, value) for name, value in held if isinstance(value, bool | int | str))
