"""Which layers the tensors of a checkpoint hold, whatever its config says, and which layer of a model each can be."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache

from transformers import PreTrainedModel

from shoal.errors import ModelError
from shoal.models.beside_layers import beside_layers, number_of
from shoal.models.diagnosis.metadata import MaybeShape
from shoal.models.load import MAX_DEPTH
from shoal.models.matching_tensors import unprovided
from shoal.models.names import renamed, state_shapes
from shoal.models.stacks import Stack

Tails = frozenset[tuple[str, MaybeShape]]


@dataclass(frozen=True)
class Layers:
    """The tensors of a checkpoint by layer."""

    prefix: str
    """What stands before a layer's number in the files."""
    by_number: dict[int, dict[str, MaybeShape]]
    """{the number in the files: {what stands behind it, from the dot on: shape}}."""
    outside: dict[str, MaybeShape]
    beside: dict[int, dict[str, MaybeShape]] = field(default_factory=dict)
    """As `by_number`, of layers that are none of the model's: they predict tokens further ahead."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the layers, ascending."""
        return tuple(sorted(self.by_number))


def layers_of(
    model: PreTrainedModel,
    stack: Stack,
    tensors: dict[str, MaybeShape],
    source: str,
    *,
    depth: int = MAX_DEPTH,
    ahead: int = 0,
) -> Layers:
    """Sort tensors by layer. `model`: any depth of the right family; `depth`: what the config says; `ahead`: how many
    layers more it announces, as in `beside_layers`.

    Raises `ModelError` M331 when no tensor belongs to a layer, M337 when those of one layer lie in several places.
    """
    counts: dict[str, int] = defaultdict(int)
    inside: dict[str, str] = {}
    state = state_shapes(model)
    found = renamed(model, tensors, state)
    for file, one in found.items():
        pieces = file.split(".")
        if one.name is None or not one.name.startswith(f"{stack.path}."):
            continue
        number = one.name[len(stack.path) + 1 :].partition(".")[0]
        inside[file] = number
        for place, piece in enumerate(pieces):
            if piece == number:
                counts[".".join([*pieces[:place], ""])] += 1
    if not counts:
        counts = _by_ending(stack.path, tensors)
    if not counts:
        raise ModelError(
            f"no tensor of {source} belongs to a layer of {type(model).__name__} ({stack.path}), as "
            f"{next(iter(tensors), 'no tensor at all')!r:.100} shows; give the config that belongs to them",
            code="M331",
        )
    prefix = max(counts, key=lambda name: (counts[name], len(name)))
    stray = next((file for file, number in inside.items() if not file.startswith(f"{prefix}{number}.")), None)
    if stray is not None:
        raise ModelError(
            f"the tensor {stray[:100]} of {source} belongs to layer {inside[stray]}, though its name is not like those "
            f"of {prefix}{inside[stray]}; the doctor cannot judge such files, load the model instead",
            code="M337",
        )
    by_number: dict[int, dict[str, MaybeShape]] = defaultdict(dict)
    outside: dict[str, MaybeShape] = {}
    for name, shape in tensors.items():
        layer = number_of(name, prefix)
        if layer is not None:
            by_number[layer][name[len(prefix) + len(str(layer)) :]] = shape
        else:
            outside[name] = shape
    beside = {n: by_number.pop(n) for n in beside_layers(model, prefix, found, depth, ahead)}
    return Layers(prefix, dict(by_number), outside, beside)


def _by_ending(path: str, tensors: dict[str, MaybeShape]) -> dict[str, int]:
    """Prefixes that end as the path of the layers does, for files of which no layer's tensor fits the model."""
    counts: dict[str, int] = defaultdict(int)
    for name in tensors:
        pieces = name.split(".")
        for place, piece in enumerate(pieces[1:], 1):
            if piece.isdecimal() and pieces[place - 1] == path.rpartition(".")[2]:
                counts[".".join([*pieces[:place], ""])] += 1
                break
    return counts


class Fit:
    """Which layers of a model the tensors of a checkpoint's layers can be."""

    def __init__(self, model: PreTrainedModel, stack: Stack, layers: Layers) -> None:
        self._model, self._prefix, self._path = model, layers.prefix, stack.path
        self._state = state_shapes(model)
        self._optional = set(self._state) - set(unprovided(model, self._state, set()))
        self._needed: dict[int, dict[str, int]] = defaultdict(dict)
        for name, shape in self._state.items():
            if name.startswith(f"{stack.path}."):
                number, _, rest = name[len(stack.path) + 1 :].partition(".")
                self._needed[int(number)][rest] = math.prod(shape)
        self.depth = stack.depth
        self._kinds = {
            i: frozenset((r, self._state[f"{stack.path}.{i}.{r}"]) for r in self._needed[i]) for i in self._needed
        }
        self._first: dict[object, int] = {}
        for i in range(self.depth):
            self._first.setdefault(self._kinds.get(i), i)
        self._cached = cache(self._fits)

    def fits(self, tails: dict[str, MaybeShape], index: int) -> bool:
        """Can these tensors be layer `index`: all of them have a place there, and each of its tensors is whole?"""
        kind = self._kinds.get(index)
        return kind is not None and self._cached(frozenset(tails.items()), self._first[kind])

    def _fits(self, tails: Tails, index: int) -> bool:
        missing, strange, shapes = self._compared(tails, index)
        return not (missing or strange or shapes)

    def differences(self, tails: dict[str, MaybeShape], index: int) -> tuple[list[str], list[str], list[str]]:
        """(tensors that are missing, tensors without a place, tensors of another shape), by what stands behind the
        layer's number: missing ones as the model calls them."""
        return self._compared(frozenset(tails.items()), index)

    def _compared(self, tails: Tails, index: int) -> tuple[list[str], list[str], list[str]]:
        here = {f"{self._prefix}{index}{tail}": shape for tail, shape in tails}
        found = renamed(self._model, here, self._state)
        start, strange, shapes = f"{self._path}.{index}.", [], []
        held: dict[str, int] = defaultdict(int)
        for file, one in found.items():
            tail = file[len(self._prefix) + len(str(index)) :]
            shape = here[file]
            if one.name is None:
                if not one.ignored:
                    strange.append(tail)
                continue
            if not one.name.startswith(start):
                strange.append(tail)
                continue
            rest = one.name[len(start) :]
            if shape is None:
                held[rest] = self._needed[index][rest]
            elif not one.converted and shape != self._state[one.name]:
                shapes.append(tail)
                held[rest] = self._needed[index][rest]
            else:
                held[rest] += math.prod(shape)
        free = {rest for rest in self._needed[index] if not held[rest] and f"{start}{rest}" in self._optional}
        needed = {rest: count for rest, count in self._needed[index].items() if rest not in free}
        missing = [rest for rest, count in needed.items() if held[rest] == 0 and count]
        total = sum(held.values())
        if not (missing or strange or shapes) and total != sum(needed.values()):
            missing = [rest for rest, count in needed.items() if held[rest] < count][:1] or missing
            strange = [] if missing else sorted(tail for tail, _ in tails)[:1]
        return sorted(missing), sorted(strange), sorted(shapes)
