"""Whether a stock model of another depth would hold the same layers: built without weights, compared slot by slot."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from shoal.errors import WriteError
from shoal.models.families import family_of
from shoal.models.first import first_only
from shoal.models.meta import meta_model
from shoal.models.parts import INDEX_NAMES
from shoal.models.stacks import Stack, find_stacks
from shoal.writing.tensors import depth_dim


def require_same_layers(
    model: PreTrainedModel, stacks: tuple[Stack, ...], config: PreTrainedConfig, slots: dict[str, tuple[int, ...]]
) -> None:
    """Build the stock model without weights and compare every slot with the base layer that it stands for: the same
    modules, tensor shapes and settings. What a family makes of a layer's position shows up here, rule or no rule.

    `slots`: of each stack the base layer in each place. Raises W207 and W208.
    """
    for stack in stacks:
        _same_numbers(stack, slots[stack.name])
    stock = meta_model(config, like=model)
    targets = {target.name: target for target in find_stacks(stock)}
    outside = _shapes_outside(model, stacks)
    for stack in stacks:
        for name, shape in outside.items():
            dim = depth_dim(name, stack)
            if dim is not None:
                size = shape[dim] // stack.depth * len(slots[stack.name])
                outside[name] = (*shape[:dim], size, *shape[dim + 1 :])
    for name, shape in _shapes_outside(stock, tuple(targets.values())).items():
        if outside.get(name) != shape:
            raise WriteError(
                f"{name} is {list(outside.get(name, ()))} in the base and would be {list(shape)}: its size follows the "
                "depth, which is not written yet; run the plan live",
                code="W208",
            )
    for stack in stacks:
        for slot, layer in enumerate(slots[stack.name]):
            with _in_place(stack, slot, layer):
                old, new = stack.layer(layer), targets[stack.name].layer(slot)
                difference = first_difference(old, new, family_of(stack.config).numbering)
            if difference is not None:
                raise WriteError(
                    f"layer {layer} in place {slot} of a stock {type(model).__name__} would differ: {difference}; "
                    "run the plan live or keep this layer's place",
                    code="W207",
                )


def _in_place(stack: Stack, slot: int, layer: int) -> AbstractContextManager[None]:
    """What only the first layer owns goes to the layer in place 0, and is taken from layer 0 elsewhere."""
    first = first_only(stack)
    if first is None or (slot == 0) == (layer == 0):
        return nullcontext()
    return first.shared_with(stack.layer(layer)) if slot == 0 else first.removed()


def _same_numbers(stack: Stack, slots: tuple[int, ...]) -> None:
    family = family_of(stack.config)
    if family.position_numbers and getattr(stack.config, family.position_numbers, False) is True:
        moved = next((i for slot, i in enumerate(slots) if slot != i), None)
        if moved is not None:
            raise WriteError(
                f"layer {moved} changes its place, and {family.position_numbers} makes numbers from it; "
                "run the plan live",
                code="W207",
            )


def _shapes_outside(model: nn.Module, stacks: tuple[Stack, ...]) -> dict[str, tuple[int, ...]]:
    inside = tuple(f"{stack.path}." for stack in stacks)
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if not n.startswith(inside)}


def first_difference(old: nn.Module, new: nn.Module, numbering: tuple[str, ...]) -> str | None:
    """The first fact in which two layers, or two modules of layers, differ, their index and what else only numbers them
    aside; None when they are the same but for the values of tensors."""
    olds, news = dict(old.named_modules()), dict(new.named_modules())
    if olds.keys() != news.keys():
        return f"modules {sorted(olds.keys() ^ news.keys())[:3]}"
    for name, module in olds.items():
        other = news[name]
        if type(module) is not type(other):
            return f"{name or 'the layer'} is a {type(other).__name__}, not a {type(module).__name__}"
        mine, theirs = _facts(module), _facts(other)
        # a config that was read from JSON has lists where one that was made may have tuples
        lists = {*numbering} | {
            key for one in (module, other) for key, value in vars(one).items() if isinstance(value, list)
        }
        for key in sorted((mine.keys() | theirs.keys()) - lists):
            if mine.get(key) != theirs.get(key):
                return f"{f'{name}.' if name else ''}{key} is {theirs.get(key)!r}, not {mine.get(key)!r}"
    return None


def _facts(module: nn.Module) -> dict[str, Any]:
    skip = {"training", "gradient_checkpointing", *INDEX_NAMES}
    plain = (bool, int, float, str, tuple, type(None))
    found: dict[str, Any] = {
        name: value
        for name, value in vars(module).items()
        if name not in skip and not name.startswith("_") and isinstance(value, plain)
    }
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return found | {f"shape of {name}": tuple(t.shape) for name, t in tensors}
