"""The four step cases, and the plan that holds them. Frozen values: every edit returns a new plan."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

from shoal.errors import PlanError
from shoal.plan.sources import (
    KV,
    STACK_NAME,
    STORED,
    LayerSource,
    NewTensors,
    Product,
    SharedMatrices,
    Source,
    StackLayer,
    TiedLayer,
    one_of,
)

PartName = Literal["layer", "attention", "mlp"]
Join = Literal["sum", "mean", "bypass"]
JOINS: tuple[Join, ...] = ("sum", "mean", "bypass")
PARTS: tuple[PartName, ...] = ("layer", "attention", "mlp")
NAME = re.compile(r"[A-Za-z0-9_.+\-]+")
_LAYERS = re.compile(rf"({STACK_NAME.pattern}\.)?\d+(-\d+)?", re.ASCII)
"""What depth notation reads as layers behind a `=`."""


def _names(*names: str | None) -> None:
    """Refuse names that depth notation cannot write: two plans could share a text, and so a hash."""
    for name in names:
        if name is not None and not NAME.fullmatch(name):
            raise PlanError(
                f"the name {name!r:.60} cannot be written in a plan; use letters, digits, _ . + -", code="P117"
            )


@dataclass(frozen=True, slots=True)
class Run:
    """Call one base layer, or only its attention or its mlp."""

    layer: int
    part: PartName = "layer"
    weights: str | None = None
    kv: KV = KV()  # noqa: RUF009 - it is frozen
    gate: str | None = None
    tie: int | StackLayer | str | None = None
    """Base index of the layer whose matrices it has, a layer of another stack, or the id of new ones that runs share;
    None: its own."""

    def __post_init__(self) -> None:
        one_of("part", self.part, PARTS)
        _names(self.weights, self.gate)
        if isinstance(self.tie, str):
            _names(self.tie)
            if _LAYERS.fullmatch(self.tie):
                raise PlanError(
                    f"the id {self.tie} of shared matrices reads as layers; give it another name, as tie-{self.tie}",
                    code="P117",
                )

    @property
    def tied_to(self) -> int | StackLayer | None:
        """The layer whose matrices it has, of its own stack or of another; None: no other's."""
        return None if isinstance(self.tie, str) else self.tie

    @property
    def tied_layer(self) -> int | None:
        """The layer of its own stack whose matrices it has; None: none of that stack."""
        return self.tie if isinstance(self.tie, int) else None

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of the new tensors that it runs with; what a later one holds stands over what an earlier one does."""
        return tuple(one for one in (self.tie, self.weights) if isinstance(one, str))

    @property
    def layer_sources(self) -> tuple[LayerSource, ...]:
        """The runs of other layers that this run takes something from."""
        return self.kv.sources

    @property
    def unmade(self) -> frozenset[Product]:
        """What of its attention it takes from another layer, so that it makes none of its own."""
        found: set[Product] = set()
        for source in self.layer_sources:
            found |= source.gives
        return frozenset(found)

    @property
    def stores(self) -> frozenset[Product]:
        """Keys and values, those of the two that it stores itself, given that its layer has any."""
        return frozenset() if self.part == "mlp" else STORED - self.unmade

    @property
    def half(self) -> Literal["keys", "values"] | None:
        """Keys or values where it stores one of the two alone."""
        kv = self.kv
        no_keys = kv.read is not None or kv.keys is not None or kv.attention is not None
        no_values = kv.read is not None or (kv.values is not None and not kv.beside)
        if self.part == "mlp" or no_keys == no_values:
            return None
        return "values" if no_keys else "keys"

    @property
    def sources(self) -> tuple[Source, ...]:
        """Everything that this run takes from elsewhere than its own layer, in the order of depth notation."""
        tied: tuple[Source, ...] = () if self.tied_to is None else (TiedLayer(self.tied_to),)
        tied = (SharedMatrices(self.tie),) if isinstance(self.tie, str) else tied
        return (*tied, *self.layer_sources, *(() if self.weights is None else (NewTensors(self.weights),)))

    @property
    def layers_named(self) -> tuple[int, ...]:
        """The base layers of its stack that the run names: its own and those of its sources."""
        tied = () if self.tied_layer is None else (self.tied_layer,)
        return (self.layer, *tied, *(source.layer for source in self.layer_sources))

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
        one_of("join", self.join, JOINS)


@dataclass(frozen=True, slots=True)
class Exit:
    """A place where the pass may end; `head` is "base" or the id of its own weights.

    Without a gate it stands at the end of the plan: nothing is decided there, and its head is the plan's own.
    """

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


def key_source(run: Run) -> int | None:
    """The base layer whose keys the run reads; None: no other's."""
    return run.kv.keys if run.kv.read is None else run.kv.read


def value_source(run: Run) -> int | None:
    """The base layer whose values the run reads in place of its own; None: no other's."""
    if run.kv.read is not None:
        return run.kv.read
    return None if run.kv.beside else run.kv.values


def added_values(run: Run) -> int | None:
    """The base layer whose values are added to the run's own; None: no other's."""
    return run.kv.values if run.kv.beside else None


def map_source(run: Run) -> int | None:
    """The base layer whose attention map the run takes over; None: it makes its own."""
    return run.kv.attention


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
    return any(gate_of(step) is not None for step in steps)


def undecided(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """What runs when nothing is skipped and nobody leaves: without gates, fills and exits but the plan's own head."""
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
                plain += [step] if step.gate is None else []
            case _:
                assert_never(step)
    return tuple(plain)


def _ungated(run: Run) -> Run:
    return replace(run, gate=None, kv=replace(run.kv, fill=None))


def writes_kv(run: Run) -> bool:
    """True when the run stores keys or values (or a recurrent state) of its own, given that its layer has any."""
    return bool(run.stores)


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


def ends_in(step: Step) -> frozenset[int]:
    """The layers whose state the step makes: what it runs, and the last that a map stands for."""
    match step:
        case Run() | Parallel():
            return frozenset(run.layer for run in runs((step,)))
        case Map():
            return frozenset({step.last})
        case Exit():
            return frozenset()
        case _:
            assert_never(step)
