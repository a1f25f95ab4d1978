"""Layers with another number of neurons than the base's, in a stock checkpoint: its config has one number for all."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from shoal.errors import WriteError
from shoal.executing.weights import Tensors
from shoal.models.meta import meta_model
from shoal.models.opened import open_model
from shoal.models.stacks import find_stacks
from shoal.plan import shapes_of
from shoal.plan.neurons import neurons_made
from shoal.plan.spec import LayerSpec, NeuronSpec
from shoal.plan.tensors import tensors_of
from shoal.writing.blueprint import AND, StackSlots


def with_width(
    model: PreTrainedModel, config: PreTrainedConfig, by_stack: Mapping[str, StackSlots], weights: Tensors
) -> tuple[PreTrainedConfig, dict[str, tuple[Any, Any]], int]:
    """`config` with the number of neurons that all slots have, the fields that say it, and how many elements less the
    layers hold for it. Which field that is, is tried on the meta device.

    Raises W276 for slots of unlike numbers, and where no one field of the config gives them.
    """
    layers = {stack.name: stack.layers for stack in open_model(model).spec.stacks}
    made = [one for name, found in by_stack.items() for one in _made(found, layers[name], weights)]
    if all(layer.neurons is None or count == layer.neurons.count for layer, count in made):
        return config, {}, 0
    counts = {(layer.neurons, count) for layer, count in made}
    neurons, count = next(iter(counts))
    if len(counts) > 1 or neurons is None or len(by_stack) > 1:
        raise _unlike(made)
    for name in _candidates(config, neurons.count):
        trial = copy.deepcopy(config)
        setattr(trial, name, count)
        if _holds(model, trial, neurons, count):
            size = sum(prod(one.shape) for one in neurons.tensors) // neurons.count
            return trial, {name: (getattr(config, name), count)}, len(made) * (neurons.count - count) * size
    raise _unlike(made)


def _made(found: StackSlots, layers: tuple[LayerSpec, ...], weights: Tensors) -> Iterator[tuple[LayerSpec, int]]:
    """Of each slot the layer whose mlp it has, and how many neurons that has there."""
    ids, mlps = dict(found.replaced), dict(found.mlps)
    for slot, base in enumerate(found.slots):
        half = mlps.get(slot)
        layer = layers[base if half is None else half.layer]
        given = (ids.get(slot) if half is None else half.weights) or ""
        own = {name: t for one in given.split(AND) for name, t in tensors_of(one, weights).items()}
        zeroed = (slot, "mlp") in found.zeroed
        # tensors that fit no number of neurons are refused where the slots' tensors are made (W209)
        count = neurons_made(layer, {} if zeroed else shapes_of(own))
        yield layer, count or (0 if layer.neurons is None else layer.neurons.count)


def _candidates(config: PreTrainedConfig, count: int) -> list[str]:
    """Fields that may hold the number: those that do, and then those that leave it to the class (GPT-2's n_inner)."""
    fields = {name: getattr(config, name, None) for name in config.to_dict()}
    said = [name for name, value in fields.items() if value == count and not isinstance(value, bool)]
    return said + [name for name, value in fields.items() if value is None]


def _holds(model: PreTrainedModel, config: PreTrainedConfig, neurons: NeuronSpec, count: int) -> bool:
    """Whether the model of a config differs in nothing but the neurons of every layer."""
    try:
        (stack,) = find_stacks(meta_model(config, like=model))
        (base,) = find_stacks(model)
        held = {name: tuple(p.shape) for name, p in base.layer(0).named_parameters()}
        for one in neurons.tensors:
            places = neurons.places(one, count)
            held[one.name] = (*one.shape[: one.dim], places, *one.shape[one.dim + 1 :])
        found = [stack.layer(n).named_parameters() for n in range(stack.depth)]
        return all({name: tuple(p.shape) for name, p in one} == held for one in found)
    except Exception:  # an odd number in a config raises whatever the arithmetic with it raises
        return False


def _unlike(made: list[tuple[LayerSpec, int]]) -> WriteError:
    layer, count = next((a, b) for a, b in made if a.neurons is not None and b != a.neurons.count)
    assert layer.neurons is not None
    return WriteError(
        f"layer {layer.index} has {count} neurons by the tensors of the plan and {layer.neurons.count} by the config, "
        "and no stock config says so of these layers; write the plan --as planned",
        code="W276",
    )
