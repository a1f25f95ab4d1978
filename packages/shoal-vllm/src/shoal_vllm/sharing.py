"""Which modules of two slots hold the same tensors of the folder, and become one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from torch import nn

Group = tuple[tuple[str, str], ...]
"""(name in the module that holds it, tensor of the folder), sorted."""


class Sharing:
    """What each slot's layer has, by name in it the tensor of the folder; modules and parameters that are made of the
    same ones are made one, and `feeds` says which place a tensor is loaded into."""

    def __init__(self, layers: nn.ModuleList, context: MutableMapping[str, Any], experts: Any) -> None:
        """`context`: vLLM's modules by their names in a compiled graph. `experts`: the class of its experts, which
        hold tensors that are named otherwise in the folder."""
        self.layers, self.context, self.experts = layers, context, experts
        self.given: dict[int, dict[str, str]] = {}
        self.feeds: dict[str, list[tuple[int, str]]] = {}
        self._owners: dict[Any, Any] = {}

    def gives(self, s: int, name: str, source: str) -> None:
        """Slot `s` has the tensor `source` under `name`."""
        self.given.setdefault(s, {})[name] = source

    def forget(self) -> None:
        """Begin again at the first slot."""
        self._owners.clear()
        self.feeds.clear()

    def share(self, s: int, path: str, stacked: dict[str, str], *, early: bool) -> None:
        """Put the modules of earlier slots in place of those of slot `s` that hold the same tensors. `early`: while the
        backend is at work; what has no memory yet waits, and so do single parameters."""
        layer, given = self.layers[s], self.given.get(s, {})
        shared: set[str] = set()
        for child in list(self._with_experts(layer)):
            names = [name for name in given if name.startswith(f"{child}.")]
            mine = getattr(layer, child)
            owner = self._owners.setdefault((child, _group(given, names)), mine)
            if owner is not mine:
                self._redirect(mine, owner)
                setattr(layer, child, owner)
                shared |= set(names)
        inside = tuple(f"{child}." for child in self._with_experts(layer))
        held = self._places(s, path, [name for name in given if not name.startswith(inside)], stacked)
        for unit, places in held.items():
            module = layer.get_submodule(unit)
            if early and any(p.is_meta for p in module.parameters()):
                continue
            names = {name for found in places.values() for name in found}
            owner = module
            if not any(True for _ in module.children()):  # or it may be an attention, which stays each slot's own
                owner = self._owners.setdefault((unit, _group(given, names)), module)
            if owner is not module:
                parent, _, last = unit.rpartition(".")
                setattr(layer.get_submodule(parent), last, owner)
                shared |= names
            elif not early:
                shared |= self._share_parameters(unit, module, places, given)
        for name in given if not early else ():
            if name not in shared:
                self.feeds.setdefault(given[name], []).append((s, name))

    def _share_parameters(
        self, unit: str, module: nn.Module, places: dict[str, list[str]], given: dict[str, str]
    ) -> set[str]:
        shared: set[str] = set()
        for leaf, names in places.items():
            mine = module._parameters.get(leaf)
            if mine is None:
                continue
            owner = self._owners.setdefault((unit, leaf, _group(given, names)), mine)
            if owner is not mine and owner.shape == mine.shape:
                module._parameters[leaf] = owner
                shared |= set(names)
        return shared

    def _with_experts(self, layer: nn.Module) -> Iterator[str]:
        for name, child in layer.named_children():
            if self.experts and any(isinstance(one, self.experts) for one in child.modules()):
                yield name

    def _redirect(self, mine: nn.Module, owner: nn.Module) -> None:
        """A compiled graph finds experts by name, in the order in which they were made."""
        ours = [one for one in mine.modules() if isinstance(one, self.experts)]
        theirs = [one for one in owner.modules() if isinstance(one, self.experts)]
        for one, other in zip(ours, theirs, strict=True):
            for name, held in list(self.context.items()):
                if held is one:
                    self.context[name] = other

    @staticmethod
    def _places(s: int, path: str, names: list[str], stacked: dict[str, str]) -> dict[str, dict[str, list[str]]]:
        """By module of the layer, as it is now, and by parameter: the names of what it was made of."""
        found: dict[str, dict[str, list[str]]] = {}
        start = f"{path}.{s}."
        for name in names:
            module, _, leaf = name.rpartition(".")
            there = stacked.get(start + module, start + module).removeprefix(start)
            found.setdefault(there, {}).setdefault(leaf, []).append(name)
        return found


def _group(given: dict[str, str], names: Iterable[str]) -> Group:
    return tuple(sorted((name, given[name]) for name in names))
