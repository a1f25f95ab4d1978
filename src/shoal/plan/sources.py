"""What a run takes from elsewhere than its own layer: another layer's keys, values, attention map or matrices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from shoal.errors import PlanError

STACK_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)

Product = Literal["queries", "keys", "values"]
"""What a projection of an attention makes."""
STORED: frozenset[Product] = frozenset({"keys", "values"})
"""What a layer stores of them."""
Fill = Literal["project", "copy", "defer", "mask"]
FILLS: tuple[Fill, ...] = ("project", "copy", "defer", "mask")


def one_of(what: str, word: str | None, words: tuple[str | None, ...]) -> None:
    """Raise P117 for a word that is none of `words`."""
    if word not in words:
        known = ", ".join(w for w in words if w is not None)
        raise PlanError(f"there is no {what} {word!r:.60}; use one of {known}", code="P117")


@dataclass(frozen=True, slots=True)
class NewTensors:
    """A source of matrices: the plan's tensors ID.PARAMETER stand in the place of the layer's own."""

    id: str
    summary: ClassVar[str] = "Own weights"

    def __str__(self) -> str:
        return f"with the weights {self.id}"


@dataclass(frozen=True, slots=True)
class LayerKV:
    """A source of keys and values: those of an earlier layer, as its latest run stored them, or of one that runs later,
    of the tokens before alone."""

    layer: int
    gives: ClassVar[frozenset[Product]] = STORED
    noun: ClassVar[str] = "KV source"
    summary: ClassVar[str] = "KV shared"

    def __str__(self) -> str:
        return f"reads the KV of layer {self.layer}"


@dataclass(frozen=True, slots=True)
class LayerKeys:
    """A source of keys alone: those of an earlier layer, as its latest run stored them."""

    layer: int
    gives: ClassVar[frozenset[Product]] = frozenset({"keys"})
    noun: ClassVar[str] = "source of keys"
    summary: ClassVar[str] = "Keys shared"

    def __str__(self) -> str:
        return f"reads the keys of layer {self.layer}"


@dataclass(frozen=True, slots=True)
class LayerValues:
    """A source of values alone: those of an earlier layer, as its latest run stored them. `beside`: what it makes of
    this forward's tokens is added to the run's own values, which it then makes and stores, in shares."""

    layer: int
    beside: bool = False
    noun: ClassVar[str] = "source of values"
    summary: ClassVar[str] = "Values shared"

    @property
    def gives(self) -> frozenset[Product]:
        """What a run with this source makes no more."""
        return frozenset() if self.beside else frozenset({"values"})

    def __str__(self) -> str:
        return f"{'adds' if self.beside else 'reads'} the values of layer {self.layer}"


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """A source of the attention map: that of an earlier layer, as its latest run made it. The run makes no queries and
    no keys; it stores values of its own, and weighs them with the map."""

    layer: int
    gives: ClassVar[frozenset[Product]] = frozenset({"queries", "keys"})
    noun: ClassVar[str] = "attention source"
    summary: ClassVar[str] = "Attention map shared"

    def __str__(self) -> str:
        return f"takes over the attention map of layer {self.layer}"


@dataclass(frozen=True, slots=True)
class StackLayer:
    """A layer of another stack than the one that names it."""

    stack: str
    layer: int

    def __post_init__(self) -> None:
        if not STACK_NAME.fullmatch(self.stack):
            raise PlanError(f"a stack cannot be called {self.stack!r:.60}; use letters, digits and _", code="P117")

    def __str__(self) -> str:
        return f"{self.stack}.{self.layer}"


@dataclass(frozen=True, slots=True)
class TiedLayer:
    """A source of matrices: those of another layer of the base stand in the place of the run's own. Within a stack they
    go by their names, across stacks as `shoal.plan.ties.paired_matrices` says.

    Matrices are the parameters of two and more dimensions; norms and biases stay the run's own, as do its mask, rotary
    tables and window, and the row of the KV cache.
    """

    layer: int | StackLayer
    noun: ClassVar[str] = "tied layer"
    summary: ClassVar[str] = "Tied matrices"

    def __str__(self) -> str:
        return f"with the matrices of layer {self.layer}"


@dataclass(frozen=True, slots=True)
class SharedMatrices:
    """A source of matrices: the plan's tensors ID.PARAMETER, which other runs may have too, stand in the place of the
    run's own. Beside them it may have tensors that are its alone."""

    id: str
    summary: ClassVar[str] = "Tied matrices"

    def __str__(self) -> str:
        return f"with the shared matrices {self.id}"


LayerSource = LayerKV | LayerKeys | LayerValues | AttentionMap
"""The sources that are runs of the base's layers: something that was computed in the same forward."""
Source = LayerSource | TiedLayer | SharedMatrices | NewTensors
"""Whose keys, values or matrices a run uses where it does not use its own layer's. A new kind of source is one more
class here, and one more field of `Run` or `KV` that `Run.sources` turns into it; the type checker names the rest."""


@dataclass(frozen=True, slots=True)
class KV:
    """Whose keys and values a run uses, and whose attention map; a layer is named by its base index.

    `read`: another layer whose keys and values this run attends to; None: its own. Of one that runs later it sees those
    of the tokens before. `keys`, `values`: those of one of the two alone, of an earlier layer. What it takes it does
    not store; with `beside` the values that it takes are added to its own. `fill`: what is stored for tokens that a
    gate let skip this run. `attention`: an earlier layer whose attention map this run takes over; it then makes no
    queries and no keys.
    """

    read: int | None = None
    fill: Fill | None = None
    attention: int | None = None
    keys: int | None = None
    values: int | None = None
    beside: bool = False

    def __post_init__(self) -> None:
        if self.beside and self.values is None:
            raise PlanError("values of no layer are to be added to a run's own; write @v0+", code="P117")
        one_of("KV fill", self.fill, (None, *FILLS))
        if self.read is not None and (self.keys is not None or self.values is not None):
            raise PlanError(
                f"keys and values come from layer {self.read} already; write @{self.read} alone, or @k and @v",
                code="P117",
            )

    @property
    def sources(self) -> tuple[LayerSource, ...]:
        """What is taken from other layers, in the order of depth notation."""
        found = (
            None if self.read is None else LayerKV(self.read),
            None if self.keys is None else LayerKeys(self.keys),
            None if self.values is None else LayerValues(self.values, self.beside),
            None if self.attention is None else AttentionMap(self.attention),
        )
        return tuple(one for one in found if one is not None)
