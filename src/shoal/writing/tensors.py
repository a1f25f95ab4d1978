"""The state dict of a stock model of another depth: tensors of layer i under the name of each slot that runs it."""

from __future__ import annotations

import torch

from shoal.executing.looked_up import TiedTensors
from shoal.models.families import family_of
from shoal.models.first import first_only
from shoal.models.opened import OpenedModel
from shoal.models.stacks import Stack
from shoal.plan.sources import StackLayer
from shoal.writing.blueprint import Blueprint, Tensors


def moved_tensors(tensors: Tensors, stack: Stack, plans: Blueprint, opened: OpenedModel, base: Tensors) -> Tensors:
    """The state dict of the stock model: tensors of layer i under the name of each slot that runs it. Those of
    `resized_tensors` are as they were.

    `tensors`: of the model in which the stacks before this one have their slots; `base`: before any had.
    """
    prefix, facts = f"{stack.path}.", opened.facts(stack.name).layers
    by_layer: dict[int, Tensors] = {}
    moved: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            number, _, rest = name[len(prefix) :].partition(".")
            by_layer.setdefault(int(number), {})[rest] = tensor
        else:
            moved[name] = tensor
    first = first_only(stack)
    if first is not None:  # what only the first layer owns goes to the layer that comes first
        lent = {rest: by_layer[0].pop(rest) for rest in list(by_layer[0]) if rest.startswith(first.prefix)}
        moved |= {f"{prefix}0.{rest}": tensor for rest, tensor in lent.items()}
    used: set[int] = set()
    for one in plans.origins():
        tied = {} if one.tie is None else _tied(opened, stack, one.layer, one.tie)
        zeroed = {part for slot, part in plans.zeroed if slot == one.slot}
        quiet = tuple(f"{n}." for part in zeroed for n in getattr(facts[one.layer].parts, part))
        for rest, tensor in by_layer[one.layer].items():
            if not one.holds(rest):
                continue
            own = "" if one.weights is None else f"{one.weights}.{rest}"
            held = base[tied[rest]] if rest in tied else tensor
            value = plans.weights[own].to(tensor.device) if own in plans.weights else held
            value = torch.zeros_like(value) if quiet and rest.startswith(quiet) else value
            # two slots must not share storage: a stock checkpoint cannot say so
            again = id(value) in used or value is not tensor
            moved[f"{prefix}{one.slot}.{rest}"] = value.clone() if again else value
            used.add(id(value))
    return moved


def _tied(opened: OpenedModel, stack: Stack, layer: int, tie: int | StackLayer) -> dict[str, str]:
    """By name in the layer, the names in the state dict of the matrices that it has from another one."""
    across = isinstance(tie, StackLayer)
    names = TiedTensors(stack.layer(layer), opened.layer_of(tie, stack), across=across).places
    path = opened.stack(tie.stack).path if isinstance(tie, StackLayer) else stack.path
    number = tie.layer if isinstance(tie, StackLayer) else tie
    return {name: f"{path}.{number}.{there}" for name, there in names.items()}


def resized_tensors(tensors: Tensors, stack: Stack, slots: tuple[int, ...]) -> Tensors:
    """The tensors outside the layers that hold one block for every layer, with the blocks of `slots` in their order."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        dim = depth_dim(name, stack)
        if dim is not None:
            blocks = tensor.unflatten(dim, (stack.depth, -1))
            made[name] = blocks.index_select(dim, torch.tensor(slots, device=tensor.device)).flatten(dim, dim + 1)
    return made


def depth_dim(name: str, stack: Stack) -> int | None:
    """The dimension along which the tensor `name` has a block for every layer; None for most tensors."""
    if name.startswith(f"{stack.path}."):
        return None
    return next(
        (d for end, d in family_of(stack.config).sized_by_depth.items() if f".{name}".endswith(f".{end}")), None
    )
