"""What a plan will take on this machine: dense and a few plans timed in turn, and the time of each kind of part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from shoal.errors import UsageError
from shoal.evaluation.scoring import Progress
from shoal.evaluation.speed import Speed, speed
from shoal.executing.bind import BoundPlan, bind
from shoal.models.opened import open_model
from shoal.plan import Plan, Spec, check, drop
from shoal.plan.cost import map_size
from shoal.plan.select import maps
from shoal.plan.spec import LayerSpec
from shoal.plan.steps import PartName, runs
from shoal.plan.tensors import Shapes

Phase = Literal["prefill", "decode"]
PARTS: tuple[PartName, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class TimeModel:
    """Times of the parts of a model, fitted to timed plans; all as shares of the dense model's time."""

    phase: Phase
    spec: Spec
    fixed: float
    """What does not depend on the plan: embeddings, head, the loop."""
    parts: Mapping[str, float]
    """What one part of each kind takes; see `part_names`."""
    error: float
    """The largest distance of a timed plan from what the fit says of it."""
    timed: Mapping[str, float]
    """Plan -> median share of the dense time in the same round."""
    dense_ms: float
    """Milliseconds: the prefill of the whole prompt, or one decoded token."""
    speed: Speed | None = None
    """All that was timed; None for a model that was kept in a file."""
    weights: Shapes = field(default_factory=dict)
    """The shapes of tensors that plans may name; a map of which nothing is known counts as a full one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `time_model_of` makes it again."""
        names = ("phase", "fixed", "parts", "error", "timed", "dense_ms")
        return {name: dict(v) if isinstance(v := getattr(self, name), Mapping) else v for name in names}

    def __call__(self, plan: Plan) -> float:
        """The predicted share of the dense time. A map counts by its FLOPs, branches of a group one after another."""
        number = counts(plan, self.spec, self.weights)
        return self.fixed + math.fsum(self.parts.get(name, 0.0) * n for name, n in number.items())

    def with_weights(self, weights: Shapes) -> TimeModel:
        """The price of plans that name tensors of these shapes."""
        return replace(self, weights={**self.weights, **weights})


def fitted_time_model(
    model: Any,
    phase: Phase,
    *,
    prompt: int = 512,
    new: int = 16,
    batch: int = 1,
    pairs: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> TimeModel:
    """Time the model, and plans without half of the layers, attentions and mlps of each kind, in turn; fit the parts.

    share(plan) = fixed + sum over kinds of parts of (time of one) x (how many run), by non-negative least squares over
    the median ratios to dense within a round. Work: a prompt of `prompt` random tokens, then `new` decoded ones,
    `pairs` rounds after one that does not count. Raises U510, U514, U515 as `speed` does, and U561 for a model of
    which nothing can be left out.
    """
    spec = open_model(model).spec
    identity = Plan.identity(spec)
    plans = {"dense": identity} | {str(plan): plan for plan in _timed_plans(identity, spec)}
    if len(plans) == 1:
        raise UsageError(
            f"no layer of {spec.family} can be left out, so times cannot be told apart; use a budget that is counted",
            code="U561",
        )
    found = timed(model, plans, prompt=prompt, new=new, batch=batch, pairs=pairs, seed=seed, progress=progress)
    shares = {name: _share(found, name, phase) for name in plans}
    fixed, parts = _fit(spec, plans, shares)
    dense = next(variant for variant in found.variants if variant.name == "dense")
    milliseconds = 1000 * (dense.prefill if phase == "prefill" else dense.decode).median
    made = TimeModel(phase, spec, fixed, parts, 0.0, shares, milliseconds, found)
    error = max(abs(made(plan) - shares[name]) for name, plan in plans.items())
    return TimeModel(phase, spec, fixed, parts, error, shares, milliseconds, found)


def time_model_of(facts: Mapping[str, Any], spec: Spec) -> TimeModel:
    """The time model of which `facts` is the plain data, for the same model on the same machine."""
    return TimeModel(spec=spec, **facts)


def timed(
    model: Any, plans: Mapping[str, Plan], weights: Mapping[str, Mapping[str, Any]] | None = None, **work: Any
) -> Speed:
    """`speed` of plans on one model, each run live with its `weights`."""
    own = weights or {}
    bound = {name: bind(model, plan, own.get(name)) for name, plan in plans.items()}
    return speed({name: partial(_live, model, one) for name, one in bound.items()}, **work)


def measured_share(
    model: Any, plan: Plan, phase: Phase, *, weights: Mapping[str, Any] | None = None, **work: Any
) -> float:
    """The median share of the dense time that `plan` takes, the two timed in turn; options as of `speed`."""
    both = {"dense": Plan.identity(open_model(model).spec), "plan": plan}
    return _share(timed(model, both, {"plan": weights or {}}, **work), "plan", phase)


def counts(plan: Plan, spec: Spec, weights: Shapes | None = None) -> dict[str, float]:
    """How many parts of each kind run; a map counts as a share of the layer it begins at, by FLOPs (see `map_size`)."""
    found: dict[str, float] = {}
    for stack in spec.stacks:
        for run in runs(plan.steps(stack.name)):
            for name in part_names(stack.layers[run.layer], run.part):
                found[name] = found.get(name, 0.0) + 1
        for step in maps(plan.steps(stack.name)):
            layer = stack.layers[step.first]
            share = map_size(step, stack.hidden, weights).flops / max(1, layer.flops)
            if share:
                found |= {name: found.get(name, 0.0) + share for name in part_names(layer, "layer")}
    return found


def part_names(layer: LayerSpec, part: PartName) -> tuple[str, ...]:
    """The kinds of parts that a run of `layer` is made of, such as `attention of full_attention (3,540,000)`."""
    kind = f"{layer.kind} ({layer.params:,})"
    if layer.attention is None or layer.mlp is None:
        return (f"layer of {kind}",)
    return tuple(f"{one} of {kind}" for one in PARTS if part in ("layer", one))


def _timed_plans(identity: Plan, spec: Spec) -> list[Plan]:
    """For each kind of layer: without every other one of them, every other attention, every other mlp."""
    found: list[Plan] = []
    for stack in spec.stacks:
        kinds: dict[tuple[str, ...], list[int]] = {}
        for layer in stack.layers:
            kinds.setdefault(part_names(layer, "layer"), []).append(layer.index)
        for names, layers in kinds.items():
            gone = layers[1::2] or layers
            for part in ("layer", *PARTS) if len(names) > 1 else ("layer",):
                if part == "layer" and len(gone) == stack.depth:
                    continue
                plan = drop(identity, gone, part=part, stack=stack.name)
                if not check(plan, spec):
                    found.append(plan)
    return found


def _fit(spec: Spec, plans: Mapping[str, Plan], shares: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    import numpy as np
    from scipy.optimize import nnls

    rows = {name: counts(plan, spec) for name, plan in plans.items()}
    names = sorted({part for row in rows.values() for part in row})
    matrix = np.array([[1.0, *(row.get(part, 0.0) for part in names)] for row in rows.values()])
    weights = np.ones(len(rows))
    weights[list(rows).index("dense")] = 100.0  # the dense share is 1 by definition, not by measurement
    found, _ = nnls(matrix * weights[:, None], np.array([shares[name] for name in rows]) * weights)
    return float(found[0]), dict(zip(names, map(float, found[1:]), strict=True))


def _share(found: Speed, name: str, phase: Phase) -> float:
    variant = next(variant for variant in found.variants if variant.name == name)
    return (variant.prefill_ratio if phase == "prefill" else variant.decode_ratio).median


@contextmanager
def _live(model: Any, bound: BoundPlan) -> Iterator[Any]:
    with bound.running():
        yield model
