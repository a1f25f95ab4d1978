"""What a run takes from elsewhere than its own layer: another layer's keys, values, attention map or matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Product = Literal["queries", "keys", "values"]
"""What a projection of an attention makes."""
STORED: frozenset[Product] = frozenset({"keys", "values"})
"""What a layer stores of them."""


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
    """A source of values alone: those of an earlier layer, as its latest run stored them."""

    layer: int
    gives: ClassVar[frozenset[Product]] = frozenset({"values"})
    noun: ClassVar[str] = "source of values"
    summary: ClassVar[str] = "Values shared"

    def __str__(self) -> str:
        return f"reads the values of layer {self.layer}"


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
class TiedLayer:
    """A source of matrices: those of another layer of the base stand in the place of the run's own, by their names.

    Matrices are the parameters of two and more dimensions; norms and biases stay the run's own, as do its mask, rotary
    tables and window, and the row of the KV cache.
    """

    layer: int
    noun: ClassVar[str] = "tied layer"
    summary: ClassVar[str] = "Tied matrices"

    def __str__(self) -> str:
        return f"with the matrices of layer {self.layer}"


LayerSource = LayerKV | LayerKeys | LayerValues | AttentionMap
"""The sources that are runs of the base's layers: something that was computed in the same forward."""
Source = LayerSource | TiedLayer | NewTensors
"""Whose keys, values or matrices a run uses where it does not use its own layer's. A new kind of source is one more
class here, and one more field of `Run` or `KV` that `Run.sources` turns into it; the type checker names the rest."""
