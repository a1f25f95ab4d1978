"""Which row or column of which matrix is which neuron of an mlp, proved by running the layer with half of them.

The matrices that make neurons answer random numbers, and the gradient of a sum in which each neuron has a factor of its
own tells of each number which neuron it makes. What does more between the matrices than work on each neuron alone (a
norm, a threshold taken from all of them) shows there, and forbids to merge and to drop neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shoal.models.examine import LayerFacts
from shoal.models.neurons import with_neurons
from shoal.models.opened import OpenedModel
from shoal.models.packed import is_plain
from shoal.models.parts import find_parts, without
from shoal.models.roles import FAILS
from shoal.plan.spec import NeuronSpec

NEAR = 1e-3
"""How far, of what the mlp answers, two halves may be off together; float32 was seen to give 1e-6."""


@dataclass(frozen=True, slots=True)
class NeuronPlaces:
    """The places of the neurons of one layer."""

    spec: NeuronSpec
    places: Mapping[str, torch.Tensor]
    """By tensor of `spec`, for each neuron its places along the tensor's dimension: [neurons, places of each]."""

    def rows(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The numbers of each neuron in a tensor of the layer's shape: [neurons, places of each, others]."""
        dim = next(one.dim for one in self.spec.tensors if one.name == name)
        taken = tensor.movedim(dim, 0)[self.places[name].to(tensor.device)]
        return taken.reshape(*taken.shape[:2], -1)

    def tensor(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The tensor of these neurons, as the layer reads it; `rows` as `rows` gives them, of any number of neurons."""
        one = next(one for one in self.spec.tensors if one.name == name)
        each = self.places[name].shape[1]
        # those of all neurons that stand first, as the places of the first neuron do, and then those of the second kind
        blocked = each == 1 or int(self.places[name][0, 1]) >= self.spec.count
        made = (rows.transpose(0, 1) if blocked else rows).flatten(0, 1)
        return (made[:, 0] if len(one.shape) == 1 else made).movedim(0, one.dim).contiguous()

    def chosen(self, tensors: Mapping[str, torch.Tensor], neurons: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of `tensors`, by their names in the layer, those of these neurons, in this order."""
        held = {one.name: tensors[one.name] for one in self.spec.tensors}
        return {n: self.tensor(n, self.rows(n, tensor)[neurons.to(tensor.device)]) for n, tensor in held.items()}

    def first(self, tensors: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """Of `tensors` those of the first `count` neurons: views, where the places of these stand together."""
        made = {}
        for one in self.spec.tensors:
            places, tensor = self.places[one.name].flatten(), tensors[one.name]
            if torch.equal(places, torch.arange(len(places))):
                made[one.name] = tensor.narrow(one.dim, 0, self.spec.places(one, count))
            else:
                made[one.name] = self.tensor(one.name, self.rows(one.name, tensor)[:count])
        return made


def neuron_places(
    opened: OpenedModel, layers: Sequence[int], stack: str | None = None
) -> dict[int, NeuronPlaces | str]:
    """For each of the layers the places of its neurons, or why they are not known. Runs a copy of each layer in float32
    on random numbers; what was found out is kept."""
    found = opened.stack(stack)
    known: dict[int, NeuronPlaces | str] = opened.remember(f"places of neurons of {found.name}", dict)
    facts = opened.facts(found.name).layers
    for layer in layers:
        if layer not in known:
            known[layer] = _places(found.layer(layer), facts[layer], by_name=found.name != "decoder")
    return {layer: known[layer] for layer in layers}


class _UnfitError(Exception):
    """Why the places of neurons are not known."""


def _places(layer: nn.Module, fact: LayerFacts, *, by_name: bool) -> NeuronPlaces | str:
    if fact.neurons is None:
        return "its mlp has experts, or runs with the neurons that it has alone"
    if not all(map(is_plain, layer.parameters())):
        return "its weights are quantised or not in memory"
    try:
        probe = _Probe(copy.deepcopy(layer).float().eval(), fact, by_name)
        return probe.proved(probe.places())
    except _UnfitError as error:
        return str(error)
    except FAILS as error:
        return f"it cannot be probed ({type(error).__name__})"


class _Probe:
    """Calls of one layer, a copy of it, whose attention adds nothing."""

    def __init__(self, layer: nn.Module, fact: LayerFacts, by_name: bool) -> None:
        parts = find_parts(layer, by_name)
        assert fact.neurons is not None
        assert parts is not None
        self.layer, self.spec, self.fact, self.parts = layer, fact.neurons, fact, parts
        self.generator = torch.Generator().manual_seed(3)
        self.device = next(layer.parameters()).device

    def call(self) -> None:
        """Random states through the layer."""
        args, kwargs = self.fact.called or ((), {})
        with without(self.layer, self.parts.attention, self.fact.returns):
            self.layer(*(self._drawn(one) for one in args), **{name: self._drawn(one) for name, one in kwargs.items()})

    def _drawn(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point():
                return torch.randn(value.shape, generator=self.generator).to(self.device)
            return torch.zeros(value.shape, dtype=value.dtype, device=self.device)
        return tuple(map(self._drawn, value)) if type(value) is tuple else value

    def places(self) -> NeuronPlaces:
        """Read off the gradients of the neurons by what their matrices answer."""
        answers: dict[str, torch.Tensor] = {}
        read: list[torch.Tensor] = []

        def answer(name: str, out: torch.Tensor) -> torch.Tensor:
            # above zero, where no activation is flat
            drawn = 0.5 + torch.rand(out.shape, generator=self.generator)
            answers[name] = drawn.to(out).requires_grad_()
            return answers[name].clone()  # some activations work in place

        modules = list(dict.fromkeys(one.name.rpartition(".")[0] for one in self.spec.makes))
        handles = [
            self.layer.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: answer(name, out))
            for name in modules
        ]
        handles.append(self._reader().register_forward_pre_hook(lambda _, args: read.append(args[0])))
        try:
            with torch.enable_grad():
                self.call()
                neurons = read[0].reshape(-1, self.spec.count).sum(0)
                codes = torch.arange(1.0, self.spec.count + 1, device=neurons.device)
                given = [answers[name] for name in modules]
                ones, coded = (
                    torch.autograd.grad((neurons * factor).sum(), given, retain_graph=True) for factor in (1.0, codes)
                )
        finally:
            for handle in handles:
                handle.remove()
        found = {
            name: self._decoded(code.reshape(-1, code.shape[-1])[0] / one.reshape(-1, one.shape[-1])[0])
            for name, one, code in zip(modules, ones, coded, strict=True)
        }
        places = {one.name: found[one.name.rpartition(".")[0]] for one in self.spec.makes}
        return NeuronPlaces(self.spec, places | {self.spec.reads.name: torch.arange(self.spec.count)[:, None]})

    def _decoded(self, codes: torch.Tensor) -> torch.Tensor:
        """[neurons, places of each] of the numbers of one module, each with the code of its neuron."""
        each = codes.numel() // self.spec.count
        neurons = codes.round()
        if not bool(torch.isfinite(codes).all()) or not bool(((codes - neurons).abs() < 0.1).all()):
            raise _UnfitError("more than an activation stands between the matrices of its mlp")
        counted = torch.bincount((neurons.long() - 1).clamp(min=0), minlength=self.spec.count)
        if not bool((counted == each).all()):
            raise _UnfitError("not every number that its matrices make belongs to one neuron")
        return neurons.argsort(stable=True).reshape(self.spec.count, each).cpu()

    def proved(self, found: NeuronPlaces) -> NeuronPlaces:
        """`found` itself: what half of the neurons add and what the others add must be what all add."""
        own = {one.name: self.layer.get_parameter(one.name).detach() for one in self.spec.tensors}
        order = torch.randperm(self.spec.count, generator=self.generator)
        half = self.spec.count // 2
        state = self.generator.get_state()
        answers = []
        for chosen in (order[:half], order[half:], order):
            self.generator.set_state(state)
            answers.append(self._answer(found.chosen(own, chosen)))
        reader = self._reader()
        bias = reader._parameters.get("bias")
        apart = answers[0] + answers[1] - (0 if bias is None else bias.detach())
        self.generator.set_state(state)
        whole = self._answer({})
        largest = torch.stack([whole, answers[0], answers[1]]).abs().max()
        if not bool(torch.stack([apart - whole, answers[2] - whole]).abs().max() <= NEAR * largest):
            raise _UnfitError("its neurons do not add up")
        return found

    def _answer(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the matrix that reads the neurons makes of them."""
        seen: list[torch.Tensor] = []
        handle = self._reader().register_forward_hook(lambda _, __, out: seen.append(out))
        try:
            with torch.no_grad(), with_neurons(self.layer, tensors):
                self.call()
        finally:
            handle.remove()
        return seen[0]

    def _reader(self) -> nn.Module:
        return self.layer.get_submodule(self.spec.reads.name.rpartition(".")[0])
