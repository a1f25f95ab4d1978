"""The four step cases, a run's sources, and the plan that holds them. Frozen values: every edit returns a new plan."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, assert_never

from shoal.errors import PlanError

PartName = Literal["layer", "attention", "mlp"]
Fill = Literal["project", "copy", "defer", "mask"]
Join = Literal["sum", "mean", "bypass"]
FILLS: tuple[Fill, ...] = ("project", "copy", "defer", "mask")
JOINS: tuple[Join, ...] = ("sum", "mean", "bypass")
PARTS: tuple[PartName, ...] = ("layer", "attention", "mlp")
NAME = re.compile(r"[A-Za-z0-9_.+\-]+")


def _one_of(what: str, word: str | None, words: tuple[str | None, ...]) -> None:
    if word not in words:
        known = ", ".join(w for w in words if w is not None)
        raise PlanError(f"there is no {what} {word!r:.60}; use one of {known}", code="P117")


def _names(*names: str | None) -> None:
    """Refuse names that depth notation cannot write: two plans could share a text, and so a hash."""
    for name in names:
        if name is not None and not NAME.fullmatch(name):
            raise PlanError(
                f"the name {name!r:.60} cannot be written in a plan; use letters, digits, _ . + -", code="P117"
            )


@dataclass(frozen=True, slots=True)
class KV:
    """Whose keys and values a run uses, and whose attention map.

    `read`: base index of an earlier layer whose keys and values this run attends to (it then stores none of its own);
    None: its own slot. `fill`: what is stored for tokens that a gate let skip this run. `attention`: base index of an
    earlier layer whose attention map this run takes over; None: it makes its own.
    """

    read: int | None = None
    fill: Fill | None = None
    attention: int | None = None

    def __post_init__(self) -> None:
        _one_of("KV fill", self.fill, (None, *FILLS))


@dataclass(frozen=True, slots=True)
class NewTensors:
    """A source of matrices: the plan's tensors ID.PARAMETER stand in the place of the layer's own."""

    id: str
    summary: ClassVar[str] = "Own weights"

    def __str__(self) -> str:
        return f"with the weights {self.id}"


@dataclass(frozen=True, slots=True)
class LayerKV:
    """A source of keys and values: those of an earlier layer, as its latest run stored them."""

    layer: int
    noun: ClassVar[str] = "KV source"
    summary: ClassVar[str] = "KV shared"

    def __str__(self) -> str:
        return f"reads the KV of layer {self.layer}"


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """A source of the attention map: that of an earlier layer, as its latest run made it. The run still makes and
    stores keys and values of its own, and weighs its own values with the map."""

    layer: int
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


LayerSource = LayerKV | AttentionMap
"""The sources that are runs of the base's layers: something that was computed in the same forward."""
Source = LayerSource | TiedLayer | NewTensors
"""Whose keys, values or matrices a run uses where it does not use its own layer's. A new kind of source is one more
class here, and one more field of `Run` or `KV` that `Run.sources` turns into it; the type checker names the rest."""


@dataclass(frozen=True, slots=True)
class Run:
    """Call one base layer, or only its attention or its mlp."""

    layer: int
    part: PartName = "layer"
    weights: str | None = None
    kv: KV = KV()
    gate: str | None = None
    tie: int | None = None
    """Base index of the layer whose matrices it has; None: its own."""

    def __post_init__(self) -> None:
        _one_of("part", self.part, PARTS)
        _names(self.weights, self.gate)

    @property
    def layer_sources(self) -> tuple[LayerSource, ...]:
        """The earlier runs of other layers that this run takes something from."""
        kv = () if self.kv.read is None else (LayerKV(self.kv.read),)
        return kv if self.kv.attention is None else (*kv, AttentionMap(self.kv.attention))

    @property
    def sources(self) -> tuple[Source, ...]:
        """Everything that this run takes from elsewhere than its own layer, in the order of depth notation."""
        tied = () if self.tie is None else (TiedLayer(self.tie),)
        return (*tied, *self.layer_sources, *(() if self.weights is None else (NewTensors(self.weights),)))

    @property
    def layers_named(self) -> tuple[int, ...]:
        """The base layers that the run names: its own and those of its sources."""
        return (self.layer, *(source.layer for source in self.sources if not isinstance(source, NewTensors)))

    @property
    def own_tensors(self) -> bool:
        """Whether all tensors that it runs with are those of its layer in the base."""
        return self.weights is None and self.tie is None

    @property
    def plain(self) -> bool:
        """Whether it is the layer, or the part of it, as the base model has it: no source, no gate, no fill."""
        return self == Run(self.layer, self.part)


@dataclass(frozen=True, slots=True)
class Map:
    """A fitted map that stands for the layers first..last. Stores no KV."""

    first: int
    last: int
    weights: str
    gate: str | None = None

    def __post_init__(self) -> None:
        _names(self.weights, self.gate)


@dataclass(frozen=True, slots=True)
class Parallel:
    """Runs that read one input: x + sum (or mean) over branches of (branch(x) - x).

    With the join bypass the mlp of each branch reads the input with what its own attention and those of the branches
    before it added: x + sum_j A_j(x) + sum_j M_j(x + sum_(i <= j) A_i(x)), every branch a whole layer.
    """

    branches: tuple[Run, ...]
    join: Join = "sum"

    def __post_init__(self) -> None:
        _one_of("join", self.join, JOINS)


@dataclass(frozen=True, slots=True)
class Exit:
    """A place where the pass may end; `head` is "base" or the id of its own weights."""

    name: str
    head: str = "base"
    gate: str | None = None

    def __post_init__(self) -> None:
        _names(self.name, self.head, self.gate)


Step = Run | Map | Parallel | Exit


def runs(steps: tuple[Step, ...]) -> Iterator[Run]:
    """Every `Run` in order, branches of parallel groups included."""
    for step in steps:
        match step:
            case Run():
                yield step
            case Parallel():
                yield from step.branches
            case Map() | Exit():
                pass
            case _:
                assert_never(step)


def kv_source(run: Run) -> int | None:
    """The base layer whose keys and values the run reads; None: its own."""
    return run.kv.read


def gate_of(step: Step) -> str | None:
    """The gate at which it is decided whether a step, or a branch of it, happens."""
    match step:
        case Parallel():
            return next((run.gate for run in step.branches if run.gate is not None), None)
        case Run() | Map() | Exit():
            return step.gate
        case _:
            assert_never(step)


def decides(steps: tuple[Step, ...]) -> bool:
    """Whether anything is decided at run time."""
    return any(_is_exit(step) or gate_of(step) is not None for step in steps)


def _is_exit(step: Step) -> bool:
    match step:
        case Exit():
            return True
        case Run() | Map() | Parallel():
            return False
        case _:
            assert_never(step)


def undecided(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """What runs when nothing is skipped and nobody leaves: without gates, fills and exits."""
    plain: list[Step] = []
    for step in steps:
        match step:
            case Run():
                plain.append(_ungated(step))
            case Map():
                plain.append(replace(step, gate=None))
            case Parallel():
                plain.append(replace(step, branches=tuple(map(_ungated, step.branches))))
            case Exit():
                pass
            case _:
                assert_never(step)
    return tuple(plain)


def _ungated(run: Run) -> Run:
    return replace(run, gate=None, kv=replace(run.kv, fill=None))


def map_source(run: Run) -> int | None:
    """The base layer whose attention map the run takes over; None: it makes its own."""
    return run.kv.attention


def writes_kv(run: Run) -> bool:
    """True when the run stores keys and values (or a recurrent state) of its own, given that its layer has any."""
    return run.part != "mlp" and kv_source(run) is None


def sources_read(steps: tuple[Step, ...]) -> set[LayerSource]:
    """What some run takes from the run of another layer."""
    return {source for run in runs(steps) for source in run.layer_sources}


def layers_read(steps: tuple[Step, ...]) -> set[int]:
    """The base layers of whose runs some run takes something."""
    return {source.layer for source in sources_read(steps)}


def layers_of(step: Step) -> Sequence[int]:
    """Base layers that a step runs or stands for; none for an exit."""
    match step:
        case Run():
            return (step.layer,)
        case Parallel():
            return tuple(run.layer for run in step.branches)
        case Map():
            return range(step.first, step.last + 1)
        case Exit():
            return ()
        case _:
            assert_never(step)
