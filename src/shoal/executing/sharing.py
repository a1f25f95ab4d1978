"""What the runs of one plan take from each other's layers during a forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, assert_never

from shoal.errors import PlanError
from shoal.executing.attention_maps import attending, made, require_maps, taken
from shoal.executing.calls import Place
from shoal.executing.checkpointed import SharedKV
from shoal.executing.forward import Forward
from shoal.executing.slots import KeysValues
from shoal.plan import Run, Step
from shoal.plan.capabilities import refused
from shoal.plan.steps import AttentionMap, LayerKV, kv_source, map_source, runs, sources_read


class Sharing:
    """Which layers make something that later runs take."""

    def __init__(self, steps: tuple[Step, ...], layers: Mapping[str, Any]) -> None:
        """`layers`: by name, those of the model. Raises P141 for one without a map that a run should take over."""
        self.sources = sources_read(steps)
        self.kv: set[int] = set()
        """Layers whose keys and values are kept for later runs."""
        self.maps: set[int] = set()
        """Layers whose attention maps are kept for later runs."""
        for source in self.sources:
            match source:
                case LayerKV():
                    self.kv.add(source.layer)
                case AttentionMap():
                    self.maps.add(source.layer)
                case _:
                    assert_never(source)

        for run in runs(steps) if self.maps else ():
            if run.layer in self.maps or map_source(run) is not None:
                require_maps(layers[str(run.layer)], run.layer)

    def around(self, run: Run, layer: Any, forward: Forward) -> AbstractContextManager[None]:
        """What stands around the call of a run whose attention map is made for others or is another layer's."""
        source = map_source(run)
        if not self.maps or run.part == "mlp" or (source is None and run.layer not in self.maps):
            return nullcontext()
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            no = refused("attention map", "checkpointed", run)
            assert no is not None
            raise PlanError(no.message, code=no.code)
        if source is not None:
            return attending(layer, taken(forward.made[AttentionMap(source)]))
        return attending(layer, made(partial(forward.made.__setitem__, AttentionMap(run.layer))))

    def checkpointed(self, run: Run, place: Place, forward: Forward, keep: Callable[[KeysValues], None]) -> SharedKV:
        """Keys and values of a run that is checkpointed: those of its source, or its own, which `keep` is given."""
        if (source := kv_source(run)) is None:
            return SharedKV(place, (), lambda own, _: own, keep)
        return SharedKV(place, forward.made[LayerKV(source)], lambda _, given: (given[0], given[1]), lambda _: None)

    def concerns_kv(self, run: Run) -> bool:
        """Whether the keys and values of this run are kept for others, or are another layer's."""
        return run.part != "mlp" and (run.layer in self.kv or kv_source(run) is not None)
