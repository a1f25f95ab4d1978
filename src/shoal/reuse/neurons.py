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

FAR = 1e4
"""Below its negative an activation that silences anything has silenced a neuron."""


@dataclass(frozen=True)
class NeuronMlp:
    """The mlp of one layer."""

    layer: int
    count: int
    """Of its neurons."""
    makers: tuple[nn.Module, ...]
    reader: nn.Module


def neuron_mlps(opened: OpenedModel, layers: Sequence[int], stack: str | None = None) -> list[NeuronMlp]:
    """The mlps of these layers, each with matrices of one number a neuron. Raises P160 for any other."""
    own, spec = opened.stack(stack), opened.spec.stack(stack)
    found = []
    for layer in layers:
        if not 0 <= layer < own.depth:
            raise _refusal(layer, f"it does not exist, layers are 0 to {own.depth - 1}")
        neurons = spec.layers[layer].neurons
        if neurons is None:
            raise _refusal(layer, "its neurons are not known")
        names = dict.fromkeys(one.name.rpartition(".")[0] for one in neurons.makes)
        makers = tuple(own.layer(layer).get_submodule(name) for name in names)
        reader = own.layer(layer).get_submodule(neurons.reads.name.rpartition(".")[0])
        if any(neurons.places(one, 1) != 1 for one in neurons.makes):
            raise _refusal(layer, "one matrix makes two numbers of each of its neurons")
        if any(hasattr(one, "base_layer") for one in (*makers, reader)):
            raise _refusal(layer, "an adapter stands beside its matrices, merge it first")
        found.append(NeuronMlp(layer, neurons.count, makers, reader))
    return found


def silencers(opened: OpenedModel, mlps: Sequence[NeuronMlp], stack: str | None = None) -> list[nn.Module]:
    """For each mlp the first of its makers that stands in front of an activation which silences neurons: they are
    nothing where it made -10,000 and the others 1. Raises P160 where none is. No plan may be running."""
    gates: list[nn.Module | None] = [None] * len(mlps)
    for at in range(max((len(mlp.makers) for mlp in mlps), default=0)):
        tried = [n for n, mlp in enumerate(mlps) if at < len(mlp.makers) and gates[n] is None]
        given: dict[int, torch.Tensor] = {}
        with _saying(mlps, tried, at, given), evaluating(opened.model), torch.no_grad():
            run_stack(opened.model, opened.stack(stack), torch.zeros((1, 2), dtype=torch.long), None)
        for number in tried:
            if number in given and not bool(given[number].any()):
                gates[number] = mlps[number].makers[at]
    for mlp, gate in zip(mlps, gates, strict=True):
        if gate is None:
            raise _refusal(mlp.layer, "no matrix that makes its neurons can silence them")
    return [gate for gate in gates if gate is not None]


def linear_of_some(module: nn.Module, x: torch.Tensor, rows: torch.Tensor, *, dim: int) -> torch.Tensor:
    """What a linear module makes of `x` [..., in] with the `rows` of its matrix [out, in] alone, or (`dim` 1) with
    these of its columns, as many as x then has."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, torch.Tensor)
    some = weight.index_select(1 - dim if is_transposed(module) else dim, rows)
    some = some.T if is_transposed(module) else some
    return nn.functional.linear(x, some, bias[rows] if bias is not None and dim == 0 else bias)


@contextmanager
def _saying(mlps: Sequence[NeuronMlp], tried: Sequence[int], at: int, given: dict[int, torch.Tensor]) -> Iterator[None]:
    """Meanwhile the maker `at` of each mlp that is tried makes -`FAR` and its others 1; `given`: what readers get."""
    handles = []
    for number in tried:
        for place, maker in enumerate(mlps[number].makers):
            handles.append(maker.register_forward_hook(partial(_made, -FAR if place == at else 1.0)))
        handles.append(mlps[number].reader.register_forward_pre_hook(partial(_note, given, number)))
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
