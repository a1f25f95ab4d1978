"""The neurons of a dense mlp: the numbers between the matrices that make them and the one that reads them.

Torch's graph says which matrix of the mlp reads what the others have made; that the layer runs with one neuron less is
tried. No value is read, so a model on the meta device tells as much, and no name of a module is known. Experts are no
modules with a matrix each and have none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shoal.models.linear import is_linear, is_transposed, said_width
from shoal.models.listening import Call
from shoal.models.parts import Parts, without
from shoal.models.roles import FAILS, leaves_of
from shoal.plan.spec import NeuronSpec, NeuronTensor


def find_neurons(layer: nn.Module, parts: Parts, returns: Mapping[str, int], call: Call) -> NeuronSpec | None:
    """The neurons of a layer whose split is `parts` and that is called as in `call`; None where no one matrix of its
    mlp reads what all others have made, or where the layer runs with as many neurons alone."""
    with _without_adapters(layer), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP2 warns of what it would do in a backward pass, and there is none
        linears = _linears(layer, parts)
        if len(linears) < 2:
            return None
        try:
            with without(layer, parts.attention, dict(returns)):
                reader = _reader(layer, linears, call)
                found = None if reader is None else _described(linears, reader)
                return found if found is not None and _runs_with_one_less(layer, found, call) else None
        except FAILS:
            return None


@contextmanager
def with_neurons(layer: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Meanwhile linear modules of the layer have these tensors, by their names in it, of whatever number of neurons."""
    saved: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = layer.get_submodule(path)
            changes: list[tuple[dict[str, Any], str, Any]] = [(module._parameters, leaf, tensor)]
            changes += [(module.__dict__, key, value) for key, value in said_width(module, leaf, tensor).items()]
            for held, key, new in changes:
                saved.append((held, key, held[key]))
                held[key] = new
        yield
    finally:
        for held, key, old in reversed(saved):
            held[key] = old


@contextmanager
def _without_adapters(layer: nn.Module) -> Iterator[None]:
    """Meanwhile the layer has the modules that peft has wrapped in place of the wrappers, and so the base's names."""
    wrapped = [
        (module._modules, key, child)
        for module in list(layer.modules())
        for key, child in module._modules.items()
        if isinstance(getattr(child, "base_layer", None), nn.Module)
    ]
    try:
        for held, key, child in wrapped:
            held[key] = getattr(child, "base_layer", None)
        yield
    finally:
        for held, key, child in wrapped:
            held[key] = child


def _linears(layer: nn.Module, parts: Parts) -> dict[str, nn.Module]:
    """The linear modules of the mlp by name; none where something else of it has matrices, as experts have."""
    found: dict[str, nn.Module] = {}
    for child in parts.mlp:
        for name, module in layer.get_submodule(child).named_modules(prefix=child):
            own = {key: p for key, p in module._parameters.items() if p is not None}
            if not any(p.dim() >= 2 for p in own.values()):
                continue
            if not is_linear(module) or own.keys() - {"weight", "bias"} or not own["weight"].is_floating_point():
                return {}
            found[name] = module
    return found


def _reader(layer: nn.Module, linears: Mapping[str, nn.Module], call: Call) -> str | None:
    """The one module that is given what all the others have made, each called once."""
    marks: dict[int, str] = {}
    held: list[torch.Tensor] = []
    read: dict[str, set[str]] = {}
    calls: list[str] = []

    def before(name: str, given: torch.Tensor) -> None:
        calls.append(name)
        read[name] = {marks[leaf] for leaf in leaves_of(given) if leaf in marks}

    def after(name: str, out: torch.Tensor) -> torch.Tensor:
        mark = out.new_zeros(()).requires_grad_()
        marks[id(mark)] = name
        held.append(mark)
        return out + mark

    handles = [m.register_forward_pre_hook(lambda _, args, n=n: before(n, args[0])) for n, m in linears.items()]
    handles += [m.register_forward_hook(lambda _, __, out, n=n: after(n, out)) for n, m in linears.items()]
    try:
        with torch.enable_grad():
            layer(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    readers = [name for name, made in read.items() if made]
    alone = len(readers) == 1 and sorted(calls) == sorted(linears) and len(read[readers[0]]) == len(linears) - 1
    return readers[0] if alone else None


def _described(linears: Mapping[str, nn.Module], reader: str) -> NeuronSpec | None:
    def tensor(module: str, leaf: str, dim: int) -> NeuronTensor:
        shape = getattr(linears[module], leaf).shape
        return NeuronTensor(f"{module}.{leaf}", tuple(shape), len(shape) - 1 if dim else 0)

    reads = tensor(reader, "weight", dim=0 if is_transposed(linears[reader]) else 1)
    count, makes = reads.shape[reads.dim], list[NeuronTensor]()
    for name, module in linears.items():
        if name != reader:
            makes.append(tensor(name, "weight", dim=1 if is_transposed(module) else 0))
            makes += [tensor(name, "bias", dim=0)] if module._parameters.get("bias") is not None else []
    fits = count > 1 and all(one.shape[one.dim] % count == 0 and one.shape[one.dim] for one in makes)
    return NeuronSpec(count, tuple(makes), reads) if fits else None


def _runs_with_one_less(layer: nn.Module, found: NeuronSpec, call: Call) -> bool:
    seen: list[int] = []
    fewer = {
        one.name: layer.get_parameter(one.name).detach().narrow(one.dim, 0, found.places(one, found.count - 1))
        for one in found.tensors
    }
    reader = layer.get_submodule(found.reads.name.rpartition(".")[0])
    handle = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    try:
        with torch.no_grad(), with_neurons(layer, fewer):
            layer(*call[0], **call[1])
    except FAILS:
        return False
    finally:
        handle.remove()
    return seen == [found.count - 1]
