"""What measures and searches hand on: a score per layer, a plan with the candidates that were looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from shoal.errors import UsageError
from shoal.plan import Plan
from shoal.plan.price import price_of, within
from shoal.record import plain

Legal = Callable[[Plan], bool]
"""Says whether a plan may be chosen: legal for the model, and expressible if it is to be written."""

Objective = Callable[[Plan], float]
"""What a search makes small, in nats per token unless it says otherwise; NaN where it could not be computed."""


Unit = Literal["layers", "params", "flops", "kv", "prefill", "decode"]
"""What a budget counts: layers that run, parameters of the written model, FLOPs of a prefill, KV elements a token, or
milliseconds measured on this machine."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much a plan may cost, as a share of what the dense model costs."""

    unit: Unit
    share: float
    price: Callable[[Plan], float]
    """What a plan costs, as a share of the dense model's cost; of times, what is predicted from measured parts. Ask
    `price_of`, which also counts new tensors as what they are."""

    def price_of(self, plan: Plan, weights: Mapping[str, Any] | None = None) -> float:
        """What `plan` costs with its `weights`, tensors or their shapes by name."""
        return price_of(self.price, plan, weights)

    def met(self, plan: Plan, weights: Mapping[str, Any] | None = None) -> bool:
        """Whether `plan` with its `weights` is within the budget, rounding aside."""
        return within(self.price_of(plan, weights), self.share)

    def to_save(self, plan: Plan) -> float:
        """By how much `plan` is too dear; zero or less where it is not."""
        return self.price_of(plan) - self.share

    def mean_saving(self, plan: Plan, smaller: Iterable[Plan]) -> float:
        """What each of the `smaller` plans saves against `plan`, on the average; 0 without any."""
        whole = self.price_of(plan)
        saved = [whole - self.price_of(one) for one in smaller]
        return math.fsum(saved) / len(saved) if saved else 0.0


@dataclass(frozen=True, slots=True)
class Traits:
    """What a measure promises, as data that its module may hold under the name `TRAITS`; tests hold it to them."""

    null: Literal["silent", "zero matrices", "none"] = "silent"
    """Which planted layer scores exactly 0: one that adds nothing, one whose matrices are all zero, or none."""
    least: bool = True
    """Whether every other layer of a model in which each layer matters then scores more."""
    text: bool = True
    """Whether it looks at text; one that does not takes None for it."""
    errors: bool = True
    """Whether it has standard errors over sequences with its options as they are."""
    first: int = 0
    """The first layer that can be judged: 1 where a layer is compared with the one below."""
    alone: bool = False
    """Whether what it says of a sequence, its notes and its detail depend on no other sequence: shares of a text may be
    measured apart then."""


@dataclass(frozen=True, slots=True)
class Scores:
    """How little each layer (or each span of `span` layers that starts there) matters: the lowest goes first."""

    measure: str
    stack: str
    unit: str
    values: tuple[float, ...]
    """By base layer; NaN where the layer could not be judged."""
    errors: tuple[float | None, ...]
    """Standard error over calibration sequences; None for a single sequence."""
    sequences: int
    tokens: int
    data: str
    span: int = 1
    notes: tuple[str, ...] = ()
    detail: Mapping[str, Any] = field(default_factory=dict)
    """What a measure knows besides: figures by head, by pair of layers, by another yardstick; plain data."""
    samples: tuple[tuple[float, ...], ...] = ()
    """By layer and calibration sequence: the sums whose total over that of `counts` is the value; empty where the value
    is not such a ratio. Not part of `to_dict`."""
    counts: tuple[float, ...] = ()
    """By calibration sequence: what the sums are divided by, the same for all layers."""
    removal: bool = True
    """False for a diagnostic, whose lowest layer is not what may be removed."""

    def order(self) -> tuple[int, ...]:
        """Layers (or starts of spans) from the least important on, ties by index; those not judged are left out."""
        judged = [i for i, value in enumerate(self.values) if not math.isnan(value)]
        return tuple(sorted(judged, key=lambda i: (self.values[i], i)))

    def require(self, plan: Plan, spans: tuple[int, ...], stack: str | None = None) -> None:
        """Raise U505 unless these scores judge that stack of `plan`'s base, in spans of one of these lengths; U530 for
        a diagnostic."""
        if not self.removal:
            raise UsageError(
                f"{self.measure} does not say which layers may go; choose them by a measure that does, such as "
                "block-influence",
                code="U530",
            )
        name, depth = plan.stack_name(stack), plan.depth(stack)
        if self.span not in spans:
            wanted = " or ".join(map(str, spans))
            raise UsageError(
                f"these scores judge spans of {self.span} layers, not of {wanted}; measure again", code="U505"
            )
        if self.stack != name or len(self.values) != depth - self.span + 1:
            raise UsageError(
                f"these {len(self.values)} scores judge a stack {self.stack!r}, not the {depth} layers of {name!r}; "
                "measure this model",
                code="U505",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is not finite becomes None, which JSON can say."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("samples", "counts")}
        return {**plain(kept), "order": list(self.order())}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One plan that a search looked at."""

    notation: str
    score: float
    note: str = ""
    twice: tuple[int, int] | None = None
    """The span, first and last layer, that runs twice in it; None for a plan of another kind."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search or a method answers."""

    plan: Plan
    trace: tuple[Candidate, ...] = ()
    scores: Scores | None = None
    weights: Mapping[str, Any] = field(default_factory=dict)
    """Tensors that the plan names, as `shoal.running` takes them."""


def removable(plan: Plan, drop: int, stack: str | None = None) -> tuple[int, ...]:
    """The base layers that run, ascending, if `drop` of them can go and one can stay. Raises U504 otherwise."""
    layers = tuple(sorted(set(plan.layers(stack))))
    if not 1 <= drop < len(layers):
        raise UsageError(f"cannot remove {drop} of {len(layers)} layers; remove 1 or more and leave one", code="U504")
    return layers


def too_few(possible: int, wanted: int) -> UsageError:
    """The error U504 of a search that found `possible` layers to remove, fewer than `wanted`."""
    if possible:
        return UsageError(f"only {possible} layers may go, not {wanted}; ask for --drop {possible}", code="U504")
    return UsageError(
        "no layer may go: without any one of them the plan is not legal or could not be judged; "
        "allow plans that only run live, or name the layers",
        code="U504",
    )
