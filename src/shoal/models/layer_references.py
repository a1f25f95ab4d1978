"""Values that count or name the layers of a stack, told by their form, and what they are for a plan.

The fields that stock classes read are data in `depth.py`. This is for all the others: keys of config.json that only
other readers obey, generation configs, files of processors and of modules beside a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

GONE: Any = object()
"""In place of a value that names nothing but layers that are gone."""

_LAYER = re.compile(r"layer|block|depth", re.IGNORECASE)
_PART = re.compile(
    r"attn|attention|mlp|ffn|moe|expert|drop|skip|prune|exit|exempt|early|indices|idxs?$|index", re.IGNORECASE
)
_OTHER = re.compile(
    r"token|vocab|lang|size|shape|dims?(_|$)|kernel|stride|dilation|channel|pixel|width|height|section|rank|ratio"
    r"|scale|rope_|(^|_)[bep]os(_|$)|pad|mean|std|label|version|factor|(^|_)ids?$",
    re.IGNORECASE,
)
_OF_ANOTHER = re.compile(r"orig|base|teacher|target|draft|parent|source|vision|visual|audio|(^|_)per_", re.IGNORECASE)
_ONE = re.compile(r"(^|_)(layer|block)s?_?(id|idx|index|no|number)$|(^|_)(layer|block)$", re.IGNORECASE)
_BOUND = re.compile(r"start|first|begin|end|last|until|stop|before|after|exit", re.IGNORECASE)


@dataclass(frozen=True)
class Renumbering:
    """Which base layer is in which place of a stack."""

    depth: int
    """Layers of the base's stack."""
    slots: tuple[int, ...]
    """The base layer of each place."""
    path: str
    """Of the list of layers in the model, such as model.layers."""
    ahead: int = 0
    """Entries that lists may have behind those of the layers, for layers beside them."""
    strict: bool = False
    """Are only names that speak of layers believed, as in files where most numbers are none?"""

    def named(self, name: str, value: Any) -> Any:
        """`value`, which a file or a config calls `name`, for the slots: the same when it says nothing of the layers,
        `GONE` when it says nothing but what is gone."""
        if isinstance(value, dict):
            return self._mapping(name, value)
        if isinstance(value, list | tuple):
            new = self._list(name, list(value))
            return value if new is not GONE and new == list(value) else new
        if isinstance(value, str):
            return next(iter(self._modules(value)), GONE)
        return self._number(name, value) if type(value) is int else value

    def _number(self, name: str, value: int) -> Any:
        if _OF_ANOTHER.search(name) or not _LAYER.search(name):
            return value
        if _ONE.search(name):
            return self._one(value)
        if _OTHER.search(name):
            return value
        if _BOUND.search(name) and not name.startswith(("num", "n_")) and 0 < value <= self.depth:
            return sum(layer < value for layer in self.slots)
        return len(self.slots) if value == self.depth else value

    def _one(self, value: int) -> Any:
        if not 0 <= value < self.depth:
            return value
        return self.slots.index(value) if value in self.slots else GONE

    def _list(self, name: str, value: list[Any]) -> Any:
        if value and all(isinstance(entry, str) for entry in value) and not self._per_layer(name, value):
            return [new for entry in value for new in self._modules(entry)] or GONE
        if self._indices(name, value):
            return [slot for slot, layer in enumerate(self.slots) if layer in value] or GONE
        if self._per_layer(name, value):
            value = [value[layer] for layer in self.slots]
        kept = [new for entry in value if (new := self.named(name, entry) if _deep(entry) else entry) is not GONE]
        return kept if kept or not value else GONE

    def _indices(self, name: str, value: list[Any]) -> bool:
        """Is it a list of layers, each once?"""
        if not value or not all(type(entry) is int and 0 <= entry < self.depth for entry in value):
            return False
        speaks = _LAYER.search(name) or (not self.strict and _PART.search(name))
        rising = not self.strict and len(value) > 1 and value == sorted(value)
        return len(set(value)) == len(value) and bool(speaks or (rising and not _OTHER.search(name)))

    def _per_layer(self, name: str, value: list[Any]) -> bool:
        if len(value) not in (self.depth, self.depth + self.ahead) or self.depth < 2:
            return False
        words = all(isinstance(entry, str) for entry in value) and len(set(value)) == len(value)
        return bool(_LAYER.search(name)) or not (self.strict or words or _OTHER.search(name))

    def _mapping(self, name: str, value: dict[Any, Any]) -> Any:
        if "model_type" in value:
            return value  # the config of another model, which counts its own layers
        numbers = {int(key): key for key in value if str(key).isdecimal() and int(key) < self.depth}
        if value and len(numbers) == len(value) and (_LAYER.search(name) or (not self.strict and _PART.search(name))):
            kind = type(next(iter(value)))
            made = {kind(slot): value[numbers[layer]] for slot, layer in enumerate(self.slots) if layer in numbers}
            return made or GONE
        made = {}
        for key, inner in value.items():
            new = self.named(f"{name}_{key}" if str(key).isidentifier() else name, inner)
            for called in self._modules(key) if isinstance(key, str) else (key,):
                if new is not GONE:
                    made[called] = new
        return made if made or not value else GONE

    def _modules(self, text: str) -> Iterator[str]:
        """`text` for every place of the layer that it names as model.layers.3.mlp does, or as it is."""
        leaf = re.escape(self.path.rpartition(".")[2])
        found = re.search(rf"(?<![A-Za-z0-9_])({leaf}\\?\.)(\d+)(?![0-9A-Za-z_])", text)
        if found is None or int(found[2]) >= self.depth:
            yield text
            return
        for slot, layer in enumerate(self.slots):
            if layer == int(found[2]):
                yield f"{text[: found.start(2)]}{slot}{text[found.end(2) :]}"


def _deep(value: Any) -> bool:
    return isinstance(value, dict | list | tuple)


def speaks_of_layers(name: str, value: Any, depth: int, path: str, *, ahead: int = 0, strict: bool = False) -> bool:
    """Does a value count or name any of `depth` layers? Asked of what a plan without layers would leave of it."""
    return Renumbering(depth, (), path, ahead, strict).named(name, value) != value
