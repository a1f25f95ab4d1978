"""Mlps whose neurons an activation silences: which matrix decides, found by what the one behind it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from shoal.errors import PlanError
from shoal.executing.inputs import run_stack
from shoal.models.evaluating import evaluating
from shoal.models.linear import is_transposed
from shoal.models.opened import OpenedModel
from shoal.models.stacks import Stack

Between = tuple[tuple[nn.Module, ...], nn.Module]
"""The modules that make the neurons of an mlp, and the one that reads them."""
FAR = 1e4
"""Below its negative an activation that silences anything has silenced a neuron."""


@dataclass(frozen=True)
class GatedMlp:
    """The mlp of one layer."""

    layer: int
    count: int
    """Of its neurons."""
    makers: tuple[nn.Module, ...]
    gate: nn.Module
    """Of the makers the one behind which the activation stands."""
    reader: nn.Module


def gated_mlps(opened: OpenedModel, layers: Sequence[int], stack: str | None = None) -> list[GatedMlp]:
    """The mlps of these layers. Raises P160 for one whose neurons are not known, or that none of the matrices that make
    them can silence: a neuron must be nothing where that matrix made -10,000, whatever the others did."""
    own, spec = opened.stack(stack), opened.spec.stack(stack)
    found = []
    for layer in layers:
        if not 0 <= layer < own.depth:
            raise _refusal(layer, f"it does not exist, layers are 0 to {own.depth - 1}")
        neurons = spec.layers[layer].neurons
        if neurons is None:
            raise _refusal(layer, "its neurons are not known")
        names = dict.fromkeys(one.name.rpartition(".")[0] for one in neurons.makes)
        makers = [own.layer(layer).get_submodule(name) for name in names]
        reader = own.layer(layer).get_submodule(neurons.reads.name.rpartition(".")[0])
        if any(neurons.places(one, 1) != 1 for one in neurons.makes):
            raise _refusal(layer, "one matrix makes two numbers of each of its neurons")
        if any(hasattr(one, "base_layer") for one in (*makers, reader)):
            raise _refusal(layer, "an adapter stands beside its matrices, merge it first")
        found.append((layer, neurons.count, tuple(makers), reader))
    gates = _gates(opened, own, [(makers, reader) for _, _, makers, reader in found])
    for (layer, *_), gate in zip(found, gates, strict=True):
        if gate is None:
            raise _refusal(layer, "no matrix that makes its neurons can silence them")
    return [
        GatedMlp(layer, count, makers, gate, reader)
        for (layer, count, makers, reader), gate in zip(found, gates, strict=True)
        if gate is not None
    ]


def linear_of_some(module: nn.Module, x: torch.Tensor, rows: torch.Tensor, *, dim: int) -> torch.Tensor:
    """What a linear module makes of `x` [..., in] with the `rows` of its matrix [out, in] alone, or (`dim` 1) with
    these of its columns, as many as x then has."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, torch.Tensor)
    some = weight.index_select(1 - dim if is_transposed(module) else dim, rows)
    some = some.T if is_transposed(module) else some
    return nn.functional.linear(x, some, bias[rows] if bias is not None and dim == 0 else bias)


def _gates(opened: OpenedModel, stack: Stack, mlps: Sequence[Between]) -> list[nn.Module | None]:
    """For each mlp the first of its makers that silences its neurons. All mlps are tried in the same forwards."""
    gates: list[nn.Module | None] = [None] * len(mlps)
    for at in range(max((len(makers) for makers, _ in mlps), default=0)):
        tried = [number for number, (makers, _) in enumerate(mlps) if at < len(makers) and gates[number] is None]
        given: dict[int, torch.Tensor] = {}
        with _saying(mlps, tried, at, given), evaluating(opened.model), torch.no_grad():
            run_stack(opened.model, stack, torch.zeros((1, 2), dtype=torch.long), None)
        for number in tried:
            if number in given and not bool(given[number].any()):
                gates[number] = mlps[number][0][at]
    return gates


@contextmanager
def _saying(mlps: Sequence[Between], tried: Sequence[int], at: int, given: dict[int, torch.Tensor]) -> Iterator[None]:
    """Meanwhile the maker `at` of each mlp that is tried makes -`FAR` and its others 1; `given`: what readers get."""
    handles = []
    for number in tried:
        makers, reader = mlps[number]
        for place, maker in enumerate(makers):
            handles.append(maker.register_forward_hook(partial(_made, -FAR if place == at else 1.0)))
        handles.append(reader.register_forward_pre_hook(partial(_note, given, number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _made(number: float, _: nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
    return torch.full_like(out, number)


def _note(given: dict[int, torch.Tensor], number: int, _: nn.Module, args: tuple[Any, ...]) -> None:
    given[number] = args[0]


def _refusal(layer: int, why: str) -> PlanError:
    return PlanError(f"no neurons of layer {layer} can be foretold: {why}; name other layers", code="P160")
