"""The manifest of a streamed write: all that it will write, worked out from config, index and headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from shoal.errors import WriteError
from shoal.executing.weights import plan_and_weights
from shoal.models.first import first_only
from shoal.models.layer_references import Renumbering
from shoal.models.load import check_source, local_folder
from shoal.models.meta import meta_model
from shoal.models.names import Name, attributed
from shoal.models.old_buffers import old_buffers
from shoal.models.opened import open_model
from shoal.models.quantised import described_quantisation, quantisation_settings
from shoal.models.shards import Stored
from shoal.models.stacks import find_stacks
from shoal.plan import Given, Plan, Spec, cost, require, shapes_of
from shoal.writing.blueprint import Blueprint
from shoal.writing.container import Item
from shoal.writing.lineage import config_note
from shoal.writing.output import with_source
from shoal.writing.own_places import own_name, own_places
from shoal.writing.surgery import blueprint


@dataclass(frozen=True)
class Manifest:
    """All that a streamed write writes, known before the first byte is."""

    folder: Path
    """Of the base."""
    plan: Plan
    plans: Blueprint
    spec: Spec
    """Of the base."""
    items: tuple[Item, ...]
    """Tensors in the order in which they are written."""
    note: dict[str, Any]
    """For the written config: where its layers come from; empty when nobody knows."""
    trusted: bool = False
    """May code that comes with the base be run, and copied?"""
    left_out: tuple[str, ...] = ()
    """The base's tensors that are no part of its model: transformers leaves them out when it loads."""
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The plan's own tensors, by its names."""

    @property
    def places(self) -> Renumbering:
        """Which layer of the base is in which place."""
        stack = self.spec.stack()
        return Renumbering(stack.depth, self.plans.slots, stack.path)

    @property
    def bytes(self) -> int:
        """Of the tensors."""
        return sum(item.source.size for item in self.items)

    @property
    def params(self) -> int:
        """By the plan's cost: a stock checkpoint holds whole layers, also where a part is zeroed."""
        return cost(self.plans.whole, self.spec).written_params - self.plans.fewer


def manifest_of(
    source: str | Path,
    plan: Given,
    *,
    zero_parts: bool = False,
    trust_remote_code: bool = False,
    weights: Mapping[str, torch.Tensor] | None = None,
    aside: Path | None = None,
) -> Manifest:
    """Read config, index and headers of a local folder, and work out every tensor of the model of `plan`. Tensors of
    the plan's own, `weights`, are put into a file in the folder `aside`, from which they are copied like all others.

    Raises what `stream` raises before it writes.
    """
    folder = local_folder(source)
    checked = check_source(source, trust_remote_code=trust_remote_code)
    stored, config, model = dict(checked.stored), checked.config, checked.structure
    if (settings := quantisation_settings(config)) is not None:
        raise WriteError(
            f"{source} is quantised ({described_quantisation(settings)}); give the folder of the model before it was",
            code="W212",
        )
    _refuse_several(model)
    stack = open_model(model).stack()
    names = attributed(model, stack, _shapes(model, stored))
    spec = open_model(model).spec
    plan, own = plan_and_weights(plan, Plan.identity(spec, source=str(source)), weights)
    require(plan, spec, shapes_of(own))
    plan = with_source(plan, str(source))
    plans = blueprint(model, plan, zero_parts=zero_parts, weights=own)
    parts = [fact.parts for fact in open_model(model).facts(stack.name).layers]
    stored = stored | own_places(model, names, stored, plans, aside)
    items = _items(names, stored, plans, parts)
    note = config_note(config, plan, plans)
    made = meta_model(plans.config, like=model)
    fits = attributed(made, open_model(made).stack(), {item.name: item.source.shape for item in items})
    stray = next((item.name for item in items if item.name not in fits), None)
    if stray is not None:
        raise WriteError(
            f"the tensor {stray} has no place in the model of the plan; load the model and write it without streaming",
            code="W217",
        )
    left_out = tuple(name for name in checked.stored if name not in names)
    return Manifest(folder, plan, replace(plans, plan=plan), spec, items, note, trust_remote_code, left_out, own)


def _refuse_several(model: PreTrainedModel) -> None:
    stacks = find_stacks(model)
    if len(stacks) > 1 or first_only(stacks[0]) is not None:
        why = (
            "has several stacks"
            if len(stacks) > 1
            else "moves a tensor of its first layer to the layer that replaces it"
        )
        raise WriteError(
            f"{type(model).__name__} {why}, which streaming cannot write yet; write it without --stream", code="W240"
        )


def _shapes(model: PreTrainedModel, stored: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Of all tensors but buffers that older versions left."""
    shapes = {name: place.shape for name, place in stored.items()}
    old = old_buffers(model, shapes, {name: place.dtype for name, place in stored.items()})
    return {name: shape for name, shape in shapes.items() if name not in old}


def _items(
    names: Mapping[str, Name], stored: Mapping[str, Stored], plans: Blueprint, parts: list[Any]
) -> tuple[Item, ...]:
    """The tensors outside the layers, and those of each slot's layer under the slot's number, in natural order."""
    items = [Item(file, stored[file]) for file, name in names.items() if name.layer is None]
    by_layer: dict[int, list[tuple[str, Name]]] = {}
    for file, name in names.items():
        if name.layer is not None:
            by_layer.setdefault(name.layer, []).append((file, name))
    for one in plans.origins():
        # one stack is streamed (W240), so no tie leads to another
        other = {name.tail: file for file, name in by_layer[one.tie]} if isinstance(one.tie, int) else {}
        zeroed = [part for slot, part in plans.zeroed if slot == one.slot]
        quiet = tuple(f"{child}." for part in zeroed for child in getattr(parts[one.layer], part))
        for file, name in by_layer[one.layer]:
            if one.holds(name.rest):
                tied = len(stored[file].shape) > 1 and name.tail in other
                new = own_name(one.weights, name.rest)
                source = stored[new if new in stored else other[name.tail] if tied else file]
                items.append(Item(name.at(one.slot), source, bool(quiet) and name.rest.startswith(quiet)))
    return tuple(sorted(items, key=lambda item: dot_natural_key(item.name)))
