"""What a plan would make of a model, before a weight is read: its cost, the config it needs, who loads it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from shoal.errors import ShoalError
from shoal.executing.weights import Tensors
from shoal.models.engines import Target, Verdict, verdicts
from shoal.models.load import check_source
from shoal.plan import Cost, Plan, Spec, cost, shapes_of, strip
from shoal.plan.select import run_of
from shoal.registry import get
from shoal.writing.reference import quiet
from shoal.writing.surgery import blueprint


@dataclass(frozen=True)
class Outlook:
    """What is known of the result of a plan."""

    plan: Plan
    before: Cost
    after: Cost
    itemsize: int
    """Bytes of one element of the KV cache, by the config's dtype."""
    changed: dict[str, tuple[Any, Any]]
    """Config fields, (old, new)."""
    refused: ShoalError | None
    """Why it cannot be written as a stock checkpoint."""
    engines: tuple[Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; KV in bytes for one token of one sequence."""
        return {
            "plan": str(self.plan),
            "hash": self.plan.hash,
            "strips": {name: strip(self.plan, name) for name, _ in self.plan.stacks},
            "dropped": {name: list(self.plan.dropped(name)) for name, _ in self.plan.stacks},
            "before": self._figures(self.before, self.before.params),
            "after": self._figures(self.after, self.after.written_params),
            "changed": {name: list(pair) for name, pair in self.changed.items()},
            "refused": None if self.refused is None else str(self.refused),
            "engines": [asdict(verdict) for verdict in self.engines],
        }

    def _figures(self, price: Cost, params: int) -> dict[str, Any]:
        return {
            "parameters": params,
            "kv_bytes_per_token": price.kv_per_token * self.itemsize,
            "prefill_flops": price.prefill_flops,
            "decode_flops": price.decode_flops,
        }


def outlook(
    source: str,
    spec: Spec,
    plan: Plan,
    *,
    weights: Tensors | None = None,
    zero_parts: bool = False,
    **options: Any,
) -> Outlook:
    """The outlook of a legal `plan` with its `weights` of the model `source`, whose spec is `spec`. `options`: for
    `check_source`."""
    with quiet():
        model = check_source(source, **options).structure
        return outlook_of(model, spec, plan, weights=weights, zero_parts=zero_parts)


def outlook_of(
    model: Any, spec: Spec, plan: Plan, *, weights: Tensors | None = None, zero_parts: bool = False
) -> Outlook:
    """The same for a model that may be on the meta device."""
    changed: dict[str, tuple[Any, Any]] = {}
    refused = None
    slots: tuple[int, ...] = ()
    fewer = 0
    try:
        plans = blueprint(model, plan, zero_parts=zero_parts, weights=weights)
        changed, slots, fewer = plans.changed, plans.slots, plans.fewer
    except ShoalError as error:
        refused = error
    target = Target(
        architecture=type(model).__name__,
        refused=None if refused is None else str(refused).partition(";")[0],
        uniform=len({layer.params for stack in spec.stacks for layer in stack.layers if layer.index in slots}) <= 1,
        blocks_refused=_blocks_refused(plan, spec),
    )
    itemsize = int(getattr(model.dtype, "itemsize", 4))
    before = cost(Plan.identity(spec), spec)
    after = cost(plan, spec, weights=shapes_of(weights or {}))
    after = replace(after, written_params=after.written_params - fewer)
    return Outlook(plan, before, after, itemsize, changed, refused, verdicts(target))


def _blocks_refused(plan: Plan, spec: Spec) -> str | None:
    if any(run_of(step) is None for step in plan.steps()):
        return "block_configs know no maps, exits and parallel layers"
    try:
        get("exchange", "nemotron-nas").load()().write(plan, spec)
    except ShoalError as error:
        return str(error).partition(";")[0]
    return None
