"""What the runs of one plan take from each other's layers during a forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, assert_never

import torch

from shoal.executing.attention_maps import attending, is_attending, made, over_fewer_heads, require_maps, taken
from shoal.executing.calls import Place
from shoal.executing.checkpointed import Around, SharedKV, SharedMap
from shoal.executing.forward import Forward
from shoal.executing.slots import KeysValues, Store, Take
from shoal.executing.weights import Tensors
from shoal.plan import Run, Step
from shoal.plan.sources import AttentionMap, LayerKeys, LayerKV, LayerValues
from shoal.plan.steps import added_values, key_source, map_source, runs, sources_read, value_source
from shoal.plan.tensors import SHARES

Mix = Callable[[torch.Tensor, torch.Tensor], KeysValues]
"""From the keys and values that a run makes to those that it stores."""


def refuse_mapless(steps: tuple[Step, ...], layer: Callable[[int], Any]) -> None:
    """Raise P141 for a run that takes over an attention map, or makes one for others, in a layer that has none to hand
    out. `layer`: the model's by its base index."""
    for taker in runs(steps):
        if (source := map_source(taker)) is not None:
            for index in (source, taker.layer):
                require_maps(layer(index), index)


class Sharing:
    """Which layers make something that later runs take."""

    def __init__(self, steps: tuple[Step, ...], fewer: bool = False) -> None:
        """`fewer`: whether some run stores fewer heads than its layer has."""
        self.fewer = fewer
        self.sources = sources_read(steps)
        self.kv: set[int] = set()
        """Layers whose keys and values, or one of the two, are kept for later runs."""
        self.added: set[int] = {one for run in runs(steps) if (one := added_values(run)) is not None}
        """Layers whose values of a forward's tokens are added to those of later runs."""
        self.maps: set[int] = set()
        """Layers whose attention maps are kept for later runs."""
        for source in self.sources:
            match source:
                case LayerKV() | LayerKeys() | LayerValues():
                    self.kv.add(source.layer)
                case AttentionMap():
                    self.maps.add(source.layer)
                case _:
                    assert_never(source)

    def shared_map(self, run: Run, layer: Any, forward: Forward) -> SharedMap | None:
        """The attention map of a run that makes it for others or takes over another layer's; None for any other run."""
        source = map_source(run)
        if not self.maps or run.part == "mlp" or (source is None and run.layer not in self.maps):
            return None

        def attend(given: torch.Tensor | None, keep: Callable[[torch.Tensor], None]) -> AbstractContextManager[None]:
            return attending(layer, made(keep) if given is None else taken(given))

        given = None if source is None else forward.made[AttentionMap(source)]
        return SharedMap(given, attend, partial(forward.made.__setitem__, AttentionMap(run.layer)))

    def heads(self, run: Run, layer: Any) -> tuple[Around, ...]:
        """What else stands around the call of a run that may attend to fewer heads than its layer has."""
        if not self.fewer or run.part == "mlp" or run.layer in self.maps or map_source(run) is not None:
            return ()
        if is_attending(layer):  # of a later source; that function repeats heads itself
            return ()
        return (partial(attending, layer, over_fewer_heads),)

    def checkpointed(
        self, run: Run, place: Place, forward: Forward, tensors: Tensors, keep: Callable[[KeysValues], None]
    ) -> SharedKV:
        """Keys and values of a run that is checkpointed: those of its sources, and its own, with which `keep` is given
        them."""
        places, added = [at for at, source in enumerate(_halves(run)) if source is not None], added_values(run)

        def mixed(own: KeysValues, given: tuple[torch.Tensor, ...]) -> KeysValues:
            taken = dict(zip(places, given, strict=False))
            keys, values = taken.get(0, own[0]), taken.get(1, own[1])
            return keys, values if added is None else _sum(run, tensors, given[-1], values)

        def hand_on(states: KeysValues) -> None:
            if run.layer in self.added:
                forward.made[LayerValues(run.layer, beside=True)] = states[1]
            if run.stores:
                keep(states)

        given = [one for one in self._taken(run, forward) if one is not None]
        if added is not None:
            given.append(forward.made[LayerValues(added, beside=True)])
        return SharedKV(place, tuple(given), mixed, hand_on)

    def read(self, run: Run, forward: Forward) -> KeysValues | None:
        """The keys and values of a run that stores none of its own; None for one that stores some. Of one that takes
        over a map nobody reads the keys."""
        keys, values = self._taken(run, forward)
        if values is None or run.half is not None:
            return None
        return (values if keys is None else keys), values

    def added_to(self, run: Run, forward: Forward, tensors: Tensors) -> Mix | None:
        """What becomes of the keys and values that a run makes before they are stored: to its values those of another
        layer are added, and both are noted where others take them. None where they stay."""
        source = added_values(run)
        if run.part == "mlp" or (source is None and run.layer not in self.added):
            return None

        def mixed(keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
            if source is not None:
                values = _sum(run, tensors, forward.made[LayerValues(source, beside=True)], values)
            forward.made[LayerValues(run.layer, beside=True)] = values
            return keys, values

        return mixed

    def halved(self, run: Run, forward: Forward, mix: Mix | None, keep: Callable[[KeysValues], None] | None) -> Take:
        """What a run does with its cache that stores its keys, or its values, alone: they lie in the place of the row's
        keys, by which transformers counts tokens, and the other half has no width. `mix`: see `added_to`. `keep` is
        given what the run attends to."""
        mine = 0 if run.half == "keys" else 1

        def take(store: Store, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
            own = (keys, values if mix is None else mix(keys, values)[1])[mine]
            kept, _ = store(own, own[..., :0])
            taken = self._taken(run, forward)
            states = [kept if one is None else one for one in taken]
            states[mine] = kept
            if keep is not None:
                keep((states[0], states[1]))
            return states[0], states[1]

        return take

    def _taken(self, run: Run, forward: Forward) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The keys and the values of other layers that a run attends to."""
        keys, values = (None if one is None else forward.made[LayerKV(one)] for one in _halves(run))
        return (None if keys is None else keys[0]), (None if values is None else values[1])

    def concerns_kv(self, run: Run) -> bool:
        """Whether the keys and values of this run are kept for others, or are another layer's."""
        return run.part != "mlp" and (
            run.layer in self.kv or run.layer in self.added or added_values(run) is not None
            or _halves(run) != (None, None)
        )  # fmt: skip


def _sum(run: Run, tensors: Tensors, theirs: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The values of another layer and the run's own in the shares of its tensor; a half each where it has none."""
    held = [tensors[name] for weights_id in run.ids if (name := f"{weights_id}.{SHARES}") in tensors]
    shares = held[-1].to(own) if held else own.new_full((2,), 0.5)
    return shares[0] * theirs.to(own) + shares[1] * own


def _halves(run: Run) -> tuple[int | None, int | None]:
    """The layers whose keys and whose values a run reads."""
    return key_source(run), value_source(run)
