"""How the layers of a plan under a policy are called: over a cache that does as the fill of the run says."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.cache_utils import Cache

from shoal.deciding.decisions import Decision
from shoal.deciding.forward import GatedForward, kinds_of
from shoal.deciding.kv_fills import (
    CopiedKV,
    CopyFill,
    DeferFill,
    GatedRun,
    KVFill,
    MaskFill,
    ProjectFill,
    next_run,
)
from shoal.deciding.kv_projection import KVProjection, store_alone
from shoal.deciding.layer_arguments import Arguments
from shoal.deciding.trace import Trace
from shoal.executing.calls import Call, cache_of, with_argument
from shoal.executing.checkpointed import SharedKV
from shoal.executing.executor import Executor
from shoal.executing.exit_heads import Heads
from shoal.executing.exit_readout import Readout
from shoal.executing.layer_list import LayerProxyList
from shoal.executing.slots import PassingCache, Take, slot_view
from shoal.executing.weights import Tensors
from shoal.models.examine import StackFacts
from shoal.models.stacks import Stack
from shoal.plan import Run, Step
from shoal.plan.price import layers_run
from shoal.plan.sources import Fill
from shoal.plan.steps import runs


@dataclass
class Known:
    """What was found out of the whole model for one policy, before its first forward."""

    arguments: Arguments | None = None
    """For masks and for late runs."""
    readout: Readout | None = None
    """For what an exit says."""
    heads: Heads | None = None
    """Those that exits have of their own."""
    projections: list[KVProjection | None] = field(default_factory=list)
    """By base layer, for the fill project."""
    prepared: Any = None
    """What the policy made of the model for itself."""


class FillingExecutor(Executor):
    """Calls the layers of runs that some token may skip, and stores what the fill says for those that do."""

    decides = True

    def __init__(
        self,
        planned: LayerProxyList,
        stack: Stack,
        facts: StackFacts,
        steps: tuple[Step, ...],
        weights: Tensors,
        known: Known,
    ) -> None:
        super().__init__(planned, stack, facts, steps, weights)
        self.known = known
        self.kinds = kinds_of(facts)
        self.copied = {self.kinds[run.layer] for run in runs(steps) if run.kv.fill == "copy"}
        self.fills = self._fills({run.kv.fill for run in runs(steps)})
        self.gated = {at: self._gated(at, step) for at, step in enumerate(steps) if isinstance(step, Run)}
        self.trace = Trace(layers=layers_run(runs(steps)))

    @property
    def _forward(self) -> GatedForward:
        assert isinstance(self.now, GatedForward)
        return self.now

    def _fills(self, wanted: set[Fill | None]) -> dict[Fill | None, KVFill]:
        fills: dict[Fill | None, KVFill] = {None: KVFill(), "project": ProjectFill(self._project), "copy": CopyFill()}
        if self.known.arguments is not None:
            following = {at: next_run(self.steps, at) for at in range(len(self.steps))}
            fills["mask"] = MaskFill(self.known.arguments)
            fills["defer"] = DeferFill(self.known.arguments, following)
        return {name: fill for name, fill in fills.items() if name in wanted}

    def _gated(self, position: int, step: Run) -> GatedRun | None:
        """None for a run that stores no keys and values."""
        slot, fact = self.slots.get((position, 0)), self.facts[step.layer]
        if slot is None or fact.keys is None or step.part == "mlp":
            return None
        return GatedRun(step, position, slot, fact, self.kinds[step.layer])

    def _called(self, run: Run, gated: GatedRun, hidden: torch.Tensor, call: Call, active: Decision) -> torch.Tensor:
        forward = self._forward
        made = self.fills[run.kv.fill].before_run(gated, forward, active, hidden, call)
        take = made.take
        if take is None and gated.kind in self.copied:
            take = CopiedKV(gated, forward)
        size = layers_run((run,))
        self.trace.counts.late += int(size * made.late * forward.view.rows)
        return made.own(self._with(take, run, (gated.position, 0), made.hidden, made.call))

    def _project(self, gated: GatedRun, hidden: torch.Tensor, call: Call) -> bool:
        """Store what the layer makes of this state; whether no more than that was computed."""
        run = gated.run
        # what comes out of the layer means nothing: nobody is told, and nothing of it is handed on
        extra, carried, recorder = self.now.extra, self.now.carried, self.recorder
        self.recorder = None
        projection = self.known.projections[run.layer]
        # adapters may have put another layer there since it was looked at
        alone = projection is not None and projection.layer is self.runner.layer_of(run)
        try:
            if projection is None or not alone:
                self._with(None, run, (gated.position, 0), hidden, call)
            else:
                # found on the whole layer: what stands for its mlp in a half is not what stands for it here
                with projection.of(hidden):
                    self._with(store_alone, replace(run, part="layer"), (gated.position, 0), hidden, call)
        finally:
            self.recorder = recorder
        self.now.extra, self.now.carried = extra, carried
        return alone

    def _with(
        self, take: Take | None, run: Run, place: tuple[int, int], hidden: torch.Tensor, call: Call
    ) -> torch.Tensor:
        """Run the step over a cache that does as `take` says."""
        slot = self.slots.get(place)
        if take is None or slot is None:
            return self._run(run, place, hidden, run.layer, *call)
        args, kwargs = call
        swapped = tuple(_view(a, slot, take) for a in args), {k: _view(v, slot, take) for k, v in kwargs.items()}
        at = self.facts[run.layer].cache_at
        if at is not None and cache_of(swapped) is None:
            swapped = with_argument(swapped, at, slot_view(PassingCache(), slot, take=take))
        self.taken = take
        try:
            return self._run(run, place, hidden, run.layer, *swapped)
        finally:
            self.taken = None

    taken: Take | None = None

    def _cache_for(self, run: Run, slot: int | None, cache: Cache) -> Cache:
        return super()._cache_for(run, slot, cache) if self.taken is None else cache

    def _shared_kv(self, run: Run) -> SharedKV | None:
        return self.taken.shared() if isinstance(self.taken, CopiedKV) else super()._shared_kv(run)


def _view(value: Any, slot: int, take: Take) -> Any:
    return slot_view(value, slot, take=take) if isinstance(value, Cache) else value
