"""What a plan costs as a share of its model, and when that is within a budget: one figure, one rule for all verbs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from shoal.plan.cost import Cost, cost
from shoal.plan.plan import Plan
from shoal.plan.spec import Spec
from shoal.plan.steps import Run
from shoal.plan.tensors import Shapes, shapes_of

TOLERANCE = 1e-9
"""By how much a price, a sum of shares, may miss a budget by rounding alone."""

FIGURES: dict[str, Callable[[Cost], float]] = {
    "layers": lambda found: found.layer_runs + found.half_runs / 2,
    "params": lambda found: found.written_params,
    "flops": lambda found: found.prefill_flops,
    "kv": lambda found: found.kv_per_token,
}
"""What can be counted of a plan: layers run for a token, parameters of the written model, FLOPs of a prefill, KV
elements of a token."""


@runtime_checkable
class Price(Protocol):
    """A price that can tell what new tensors cost."""

    def __call__(self, plan: Plan, /) -> float:
        """What the plan costs, as a share of the dense model's cost."""

    def with_weights(self, weights: Shapes) -> Price:
        """The price of plans that name tensors of these shapes."""


@dataclass(frozen=True)
class CountedPrice:
    """One of `FIGURES` of a plan, as a share of the dense model's."""

    unit: str
    spec: Spec
    weights: Shapes = field(default_factory=dict)

    @cached_property
    def dense(self) -> float:
        """The figure of the whole model; 0 for a model that has none of it."""
        return FIGURES[self.unit](cost(Plan.identity(self.spec), self.spec))

    def __call__(self, plan: Plan) -> float:
        return FIGURES[self.unit](cost(plan, self.spec, weights=self.weights)) / self.dense

    def with_weights(self, weights: Shapes) -> CountedPrice:
        """The price of plans that name tensors of these shapes."""
        return replace(self, weights={**self.weights, **weights})


def price_of(price: Callable[[Plan], float], plan: Plan, weights: Mapping[str, Any] | None = None) -> float:
    """What `price` says of `plan` with its `weights`, tensors or their shapes by name. A function that knows plans
    alone is asked as it is."""
    if weights and isinstance(price, Price):
        price = price.with_weights(shapes_of(weights))
    return price(plan)


def shares(after: Cost, dense: Cost) -> dict[str, float]:
    """Each of `FIGURES` as a share of the dense model's, 1 for what that has none of."""
    whole = {name: figure(dense) for name, figure in FIGURES.items()}
    return {name: figure(after) / whole[name] if whole[name] else 1.0 for name, figure in FIGURES.items()}


def layers_run(group: Iterable[Run]) -> float:
    """How many layers these runs are: an attention or an mlp alone is half a one, as in `FIGURES`."""
    return math.fsum(1.0 if run.part == "layer" else 0.5 for run in group)


def head_in_layers(spec: Spec) -> float:
    """What the output head computes for a token, in layers of the mean size of the decoder, by FLOPs."""
    layers = spec.stack().layers
    return spec.head_flops / max(1.0, sum(layer.flops for layer in layers) / len(layers))


def within(price: float, share: float) -> bool:
    """Whether a price meets a budget."""
    return price <= share + TOLERANCE


def removals(to_save: float, mean: float) -> int:
    """How many removals of the `mean` saving it takes until a plan that is `to_save` too dear meets its budget."""
    return math.ceil((to_save - TOLERANCE) / mean)
