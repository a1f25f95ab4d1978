"""What one run changes in its layer for the length of one call: parts left out, tensors in place of the layer's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from shoal.executing.affine import Affine
from shoal.executing.looked_up import Converted
from shoal.executing.low_rank import LowRank
from shoal.models.linear import said_width
from shoal.models.parts import stubs
from shoal.models.streamed import is_hooked, weights_loaded
from shoal.plan.around import affine_of, around_run
from shoal.plan.low_rank import WORDS, factors_of
from shoal.plan.tensors import SHARES

Entries = list[tuple[dict[str, Any], str, Any]]
"""(dictionary of a module, key, what stands there during the call)."""


class Exchange:
    """Entries of the layer's dictionaries that are exchanged for the length of a call.

    Prepared once and used for every call; tensors are looked up in each. Where the layer has changed meanwhile (PEFT
    wraps a module, accelerate brings weights in), it is prepared anew. A parameter that has several names in the layer
    is exchanged under all of them. Weights that accelerate keeps elsewhere are brought in before they are exchanged: it
    would put them back over what stands there.
    """

    def __init__(
        self,
        layer: nn.Module,
        left_out: tuple[str, ...],
        returns: Mapping[str, int],
        tensors: Mapping[str, torch.Tensor],
        unused: Mapping[str, int] | None = None,
        lender: nn.Module | None = None,
    ) -> None:
        """`left_out`: children that contribute nothing; `returns`: for each how many values it returns besides its
        tensor, see `stubs`. `tensors`: by name in the layer; they are used in the dtype and on the device of what they
        replace. `unused`: modules anywhere in the layer whose answer nobody uses, by name, with its last dimension:
        they are not called, and what `tensors` holds of them is not used. `lender`: the layer that some of the
        `tensors` belong to.
        """
        self.layer, self.left_out, self.returns, self.tensors = layer, left_out, dict(returns), tensors
        self.unused = dict(unused or {})
        self._lent_by = () if lender is None else (lender,)
        self._hooked = False
        self._converted = Converted()
        self._stubs: Entries = []
        self._places: list[tuple[str, torch.Tensor, list[tuple[dict[str, Any], str]]]] = []
        self._expected: list[tuple[dict[str, Any], str, Any]] = []
        self._prepared = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Meanwhile the entries are exchanged; they are put back whatever happens."""
        with ExitStack() as held:
            if not self.is_prepared():
                self._prepare()
            if self._hooked:
                for layer in (self.layer, *self._lent_by):
                    held.enter_context(weights_loaded(layer))
                self._prepare()
            with self._exchanged():
                yield

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        entries = list(self._stubs)
        for name, old, places in self._places:
            new = self._converted.like(name, self.tensors[name], old)
            entries += [(*place, new) for place in places]
            if new.shape != old.shape:
                entries += self._said(name, new)
        before = [place[key] for place, key, _ in entries]
        try:
            for place, key, new in entries:
                place[key] = new
            yield
        finally:
            for (place, key, _), old in zip(entries, before, strict=True):
                place[key] = old

    def is_prepared(self) -> bool:
        """Whether what is exchanged is still there."""
        return self._prepared and all(place.get(key) is old for place, key, old in self._expected)

    def _prepare(self) -> None:
        children: dict[str, Any] = self.layer._modules
        self._stubs = [(children, name, stub) for name, stub in stubs(self.layer, self.left_out, self.returns).items()]
        self._places = []
        shared = _names_of_shared(self.layer) if self.tensors else {}
        for path, width in self.unused.items():
            owner, leaf = self._child(path)
            self._stubs.append((owner, leaf, _Unused(owner[leaf], width)))
        under = tuple(f"{path}." for path in self.unused)
        all_held = (*self.layer.named_parameters(remove_duplicate=False), *self.layer.named_buffers())
        there = {name for name, _ in all_held}
        aside = {SHARES, *around_run(dict.fromkeys(self.tensors), there)}
        names = [name for name in self.tensors if name not in aside and not name.startswith(under)]
        beside = self._beside(names, there)
        self._stubs += [entry for entry, _ in beside]
        factors = {name for _, found in beside for name in found}
        for name in (name for name in names if name not in factors):
            held, leaf = _held(self.layer, name)
            old = held[leaf]
            self._places.append((name, old, [_held(self.layer, other) for other in shared.get(id(old), (name,))]))
        entries = [(place, key) for place, key, _ in self._stubs] + [
            one for _, _, places in self._places for one in places
        ]
        self._expected = [(place, key, place[key]) for place, key in entries]
        self._prepared, self._hooked = True, bool(self.tensors) and any(map(is_hooked, (self.layer, *self._lent_by)))

    def _beside(self, names: list[str], there: set[str]) -> list[tuple[tuple[dict[str, Any], str, Any], list[str]]]:
        """What stands for each module that has factors, or a scale or shift, with the names of these."""
        own = {name: name for name in names}
        factors, affine = factors_of(own, there), affine_of(own, there)
        found = []
        for path in dict.fromkeys((*factors, *affine)):
            owner, leaf = self._child(path)
            child = stand_in = owner[leaf]
            words = {**factors.get(path, {}), **affine.get(path, {})}
            if path in factors:
                pair = WORDS[next(iter(factors[path]))]
                stand_in = LowRank(stand_in, pair, partial(self._factor, child, words))
            if path in affine:
                stand_in = Affine(stand_in, tuple(affine[path]), partial(self._factor, child, words))
            found.append(((owner, leaf, stand_in), list(words.values())))
        return found

    def _said(self, name: str, new: torch.Tensor) -> Entries:
        """What a module says of its width, where it has a weight of another."""
        path, _, leaf = name.rpartition(".")
        module = self.layer.get_submodule(path)
        return [(module.__dict__, key, value) for key, value in said_width(module, leaf, new).items()]

    def _child(self, path: str) -> tuple[dict[str, Any], str]:
        """The dictionary that holds a module of the layer, and its key."""
        parent, _, leaf = path.rpartition(".")
        return self.layer.get_submodule(parent)._modules, leaf

    def _factor(self, module: Any, factors: Mapping[str, str], word: str) -> torch.Tensor:
        name = factors[word]
        return self._converted.like(name, self.tensors[name], module.weight)


class _Unused(nn.Module):
    """Stands for a module whose answer nobody uses: zeros in its shape."""

    def __init__(self, module: Any, width: int) -> None:
        super().__init__()
        self.__dict__.update(_module=module, _width=width)  # not registered: its parameters must not appear twice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.__dict__["_width"])


def _held(layer: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary that holds a parameter or buffer, and its key. Raises AttributeError or KeyError for neither."""
    path, _, leaf = name.rpartition(".")
    module = layer.get_submodule(path)
    held: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    held[leaf]
    return held, leaf


def _names_of_shared(layer: nn.Module) -> dict[int, list[str]]:
    """The names of every parameter that has several, by its identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in layer.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {key: own for key, own in names.items() if len(own) > 1}
