"""The tensors of a plan that learns, as modules of the model: optimisers, wrappers and savers see them there.

    handle = shoal.apply(model, "0-11,12:heal-12,~13-14,15-29", weights, modules=True)
    handle.layers["heal-12"]  # an ordinary layer, a clone of base layer 12, which is called in that layer's place
    handle.tensors            # from the plan's names ("heal-12.mlp.up_proj.weight") to what is there now
    handle.restore()          # they are gone, and state_dict() has the names that it had

Until then the model has a module `shoal`: `shoal.layers.ID` is a replaced layer, `shoal.tensors.ID` holds the tensors
of a map or of an exit's head as parameters. The model's state_dict, named_parameters and modules have them like any
other, so gradient checkpointing, peft's search for targets, DDP and FSDP's wrapping need to know nothing of plans. The
base's own tensors are not touched: the paused plan is the dense model whatever has been learned. Layers are wrapped or
sharded inside `handle.paused()`, where the list of layers is the model's own.

Without modules the tensors of a replaced layer are lent to the base layer for the length of a call (`exchange.py`).
That takes no memory and is for running; what shards or averages parameters module by module does not see them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from shoal.errors import PlanError
from shoal.executing.looked_up import TensorsOf
from shoal.executing.weights import ids_of
from shoal.models.linear import said_width
from shoal.models.lists import BESIDE, Stack
from shoal.models.opened import OpenedModel
from shoal.models.streamed import is_hooked
from shoal.plan import Plan, Run
from shoal.plan.steps import Step, gate_of, runs

FIXED = ("limit", "keys")
"""Tensors of a map that no gradient reaches."""


class PlanModules(nn.Module):
    """What a model holds under the name `shoal` while the tensors of a plan are modules of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.tensors = nn.Module(), nn.Module()


class ModuleTensors(Mapping[str, torch.Tensor]):
    """The tensors of a plan by the plan's names, each looked up in the module that holds it now.

    Of a layer they are its parameters and the buffers that its state_dict has; what peft puts inside is among them, by
    the names that peft gives.
    """

    def __init__(self, modules: PlanModules) -> None:
        self.modules = modules
        self.base: dict[str, tuple[str, int]] = {}
        """By id of a replaced layer: the stack and the base layer that it is a clone of."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        """The shapes of all tensors when they became modules, by the plan's names."""

    def layer(self, weights_id: str | None) -> nn.Module | None:
        """The module of a replaced layer; None for an id that is no layer's."""
        return None if weights_id is None else self.modules.layers._modules.get(_key(weights_id))

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The replaced layers by id."""
        return {weights_id: layer for weights_id in self.base if (layer := self.layer(weights_id)) is not None}

    def __getitem__(self, name: str) -> torch.Tensor:
        for weights_id, module in self._held():
            if name.startswith(f"{weights_id}."):
                path, _, leaf = name.removeprefix(f"{weights_id}.").rpartition(".")
                owner = dict(module.named_modules()).get(path) if path else module
                found = None if owner is None else owner._parameters.get(leaf, owner._buffers.get(leaf))
                if found is not None:
                    return found
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        for weights_id, module in self._held():
            yield from (f"{weights_id}.{name}" for name in _names(module))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _held(self) -> Iterator[tuple[str, nn.Module]]:
        for kind in (self.modules.layers, self.modules.tensors):
            for key, module in kind._modules.items():
                assert module is not None
                yield _id(key), module


def put_modules(opened: OpenedModel, plan: Plan, weights: Mapping[str, torch.Tensor]) -> ModuleTensors:
    """Register the tensors that `plan` names as modules of the model, with the values in `weights`. It has been checked
    that they are legal.

    A replaced layer is a deep copy of its base layer, its tensors in that layer's dtype and on its device; what
    `weights` leaves out is the base's. Others keep their dtype and go where the model is. All that hold floating-point
    numbers ask for gradients, whatever the base's do: freeze what shall not learn. Raises P122 when modules of another
    plan are there, P124 for a layer whose weights accelerate keeps elsewhere, P154 for one id at several layers, P157
    for own tensors beside those of a tied layer.
    """
    if BESIDE in opened.model._modules:
        raise PlanError("another plan is running on this model; restore it first", code="P122")
    made = ModuleTensors(PlanModules())
    for stack in opened.stacks:
        steps = plan.steps(stack.name)
        for run in runs(steps):
            if run.weights is not None:
                _refuse_beside(run, run.weights, stack, weights)
            if run.weights is not None and run.tie is not None:
                raise PlanError(
                    f"layer {run.layer} has tensors of its own beside the matrices of {run.tie}, and as a module "
                    f"it would have all of its own; write {run.layer}:{run.weights}, or run the plan without modules",
                    code="P157",
                )
            if run.weights is not None:
                _put_layer(made, stack, run, weights)
        gates = {gate for gate in map(gate_of, steps) if gate is not None and TensorsOf(gate, weights)}
        for weights_id in sorted((ids_of(steps) | gates) - made.base.keys()):
            _put_tensors(made, weights_id, weights, opened.device)
    made.shapes = {name: tuple(tensor.shape) for name, tensor in made.items()}
    opened.model.add_module(BESIDE, made.modules)
    return made


def take_modules_away(opened: OpenedModel) -> None:
    """The model has no modules of a plan any more."""
    opened.model._modules.pop(BESIDE, None)


def refuse_shared(tensors: ModuleTensors, stack: Stack, steps: tuple[Step, ...]) -> None:
    """Raise P154 for a run of another layer than the one that the module of its tensors is a clone of."""
    for run in runs(steps):
        if run.weights in tensors.base:
            _require_place(tensors, stack, run)


def _put_layer(made: ModuleTensors, stack: Stack, run: Run, weights: Mapping[str, torch.Tensor]) -> None:
    assert run.weights is not None
    if run.weights in made.base:
        return _require_place(made, stack, run)
    if is_hooked(stack.layer(run.layer)):
        raise PlanError(
            f"layer {run.layer} is offloaded, so that a module made of it would hold no weights; load the model whole, "
            "or run the plan without modules",
            code="P124",
        )
    layer = copy.deepcopy(stack.layer(run.layer))
    held = dict([*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)])
    with torch.no_grad():
        for name, tensor in TensorsOf(run.weights, weights).items():
            if held[name].shape != tensor.shape:
                _resize(layer, name, held[name], tensor)
            held[name].copy_(tensor)
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    made.modules.layers._modules[_key(run.weights)] = layer
    made.base[run.weights] = stack.name, run.layer
    return None


def _refuse_beside(run: Run, weights_id: str, stack: Stack, weights: Mapping[str, torch.Tensor]) -> None:
    layer = stack.layer(run.layer)
    held = {name for name, _ in (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers())}
    beside = next((name for name in TensorsOf(weights_id, weights) if name not in held), None)
    if beside is not None:
        raise PlanError(
            f"layer {run.layer} has {weights_id}.{beside} beside its own tensors, and as a module it would have those "
            "of a layer alone; run the plan without modules",
            code="P157",
        )


def _resize(layer: nn.Module, name: str, held: torch.Tensor, tensor: torch.Tensor) -> None:
    """Make room for fewer heads or another number of neurons than the base layer has."""
    held.data = held.data.new_empty(tensor.shape)
    path, _, leaf = name.rpartition(".")
    module = layer.get_submodule(path)
    module.__dict__.update(said_width(module, leaf, tensor))


def _require_place(tensors: ModuleTensors, stack: Stack, run: Run) -> None:
    assert run.weights is not None
    name, layer = tensors.base[run.weights]
    if (name, layer) != (stack.name, run.layer):
        raise PlanError(
            f"the tensors {run.weights} are for {name} layer {layer} and for {stack.name} layer {run.layer}, and as a "
            "module they are one layer; name them apart",
            code="P154",
        )


def _put_tensors(
    made: ModuleTensors, weights_id: str, weights: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    owner = nn.Module()
    for name, tensor in TensorsOf(weights_id, weights).items():
        own, place = tensor.detach().to(device, copy=True), owner
        *path, leaf = name.split(".")
        for piece in path:
            if piece not in place._modules:
                place.add_module(piece, nn.Module())
            place = place.get_submodule(piece)
        if name in FIXED or not own.is_floating_point():
            place.register_buffer(leaf, own)
        else:
            place.register_parameter(leaf, nn.Parameter(own))
    made.modules.tensors._modules[_key(weights_id)] = owner


def _names(module: nn.Module) -> Iterator[str]:
    """Of parameters and of the buffers that are saved."""
    for prefix, owner in module.named_modules(remove_duplicate=False):
        saved = (name for name in owner._buffers if name not in owner._non_persistent_buffers_set)
        for name in (*owner._parameters, *saved):
            if owner._parameters.get(name, owner._buffers.get(name)) is not None:
                yield f"{prefix}.{name}" if prefix else name


def _key(weights_id: str) -> str:
    """An id as the name of a module, which holds no dot."""
    return weights_id.replace(".", "%2E")


def _id(key: str) -> str:
    return key.replace("%2E", ".")
