"""Which tensors of a layer write what its attention or mlp adds to the hidden state: found and proved by probing.

A stand-in can be folded into a part exactly when these tensors, multiplied on their output side, multiply what the
part adds. A norm behind the part, or a tensor that two parts share, shows here and forbids the fold; a bias, experts
and a shared expert are simply further tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from shoal.data import Data
from shoal.fitting.holes import Pair
from shoal.models.packed import is_plain
from shoal.models.precision import in_float64
from shoal.models.streamed import parameters_of, weights_loaded
from shoal.plan import Run
from shoal.plan.steps import PartName
from shoal.recording.layer_inputs import LayerInputs, ResidualStream

PROBE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Writer:
    """One tensor of a layer and the dimension along which its entries belong to the hidden state."""

    name: str
    dim: int

    def scaled(self, tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """`tensor` with each output channel times its `scale` [hidden]."""
        shape = [1] * tensor.dim()
        shape[self.dim] = -1
        return tensor * scale.to(tensor).reshape(shape)

    def mapped(self, tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`tensor` with the map `weight` [hidden, hidden] behind its output."""
        last = in_float64(tensor).movedim(self.dim, -1)
        mapped = (last @ weight.to(last).T).movedim(-1, self.dim)
        return mapped.to(device=tensor.device, dtype=tensor.dtype).contiguous()


class Prober:
    """Runs single layers on a few tokens with tensors exchanged."""

    def __init__(self, pair: Pair) -> None:
        data = pair.job.data
        ids = data.ids[:1, :PROBE_TOKENS]
        inputs = LayerInputs(pair.job.model, Data(ids, None, data.info), stack=pair.job.stack)
        self.pair, self.inputs = pair, inputs

    @torch.no_grad()
    def writers(self, index: int, part: PartName) -> tuple[Writer, ...]:
        """The tensors that write what `part` of layer `index` adds, and nothing else; empty when there are none such:
        a norm behind the part, no parts at all, weights that are quantised or not here to be read."""
        with weights_loaded(self.inputs.stack.layer(index)):
            return self._writers(index, part)

    def _writers(self, index: int, part: PartName) -> tuple[Writer, ...]:
        layer, fact = self.inputs.stack.layer(index), self.inputs.facts.layers[index]
        if fact.parts is None or not _plain(layer):
            return ()
        generator = torch.Generator().manual_seed(index)
        self.stream = self._random(generator)
        children = tuple(f"{child}." for child in getattr(fact.parts, part))
        found: list[Writer] = []
        for name, tensor in layer.named_parameters():
            if name.startswith(children):
                found += [w for w in self._candidates(name, tensor) if self._writes(index, part, w, tensor, generator)]
        return tuple(found) if found and self._complete(index, part, found) else ()

    def _random(self, generator: torch.Generator) -> ResidualStream:
        stream = self.inputs.stream()
        start = stream.states[0]
        stream.states = [torch.randn(start.shape, generator=generator).to(start)]
        return stream

    def _candidates(self, name: str, tensor: torch.Tensor) -> list[Writer]:
        size = self.inputs.first_states[0].shape[-1]
        return [Writer(name, dim) for dim in range(tensor.dim()) if tensor.shape[dim] == size]

    def _adds(self, index: int, part: PartName, own: dict[str, torch.Tensor]) -> torch.Tensor:
        """What `part` of the layer adds with the tensors `own`, float64 [tokens, hidden]."""
        weights = {f"probe.{name}": tensor for name, tensor in own.items()}
        out = self.stream.run(0, Run(index, part, "probe" if own else None), weights)
        return (in_float64(out) - in_float64(self.stream.states[0])).flatten(0, -2)

    def _writes(
        self, index: int, part: PartName, writer: Writer, tensor: torch.Tensor, generator: torch.Generator
    ) -> bool:
        """With a random tensor in its place: does a scale along `dim` scale the tensor's own share by channel?"""
        # large, so that rounding the sum with the state does not hide what the tensor writes
        drawn = torch.randn(tensor.shape, generator=generator).to(tensor)
        size = tensor.shape[writer.dim]
        # far from 1, so that a norm behind the part, which takes the scale away again, shows in any precision
        scale = 3.5 * torch.rand(size, generator=generator).to(tensor) + 0.5
        without = self._adds(index, part, {writer.name: torch.zeros_like(tensor)})
        share = self._adds(index, part, {writer.name: drawn}) - without
        scaled = self._adds(index, part, {writer.name: writer.scaled(drawn, scale)}) - without
        difference = (scaled - share * scale.to(share)).abs().max()
        return bool(share.any()) and bool(difference <= _near(tensor) * torch.stack([scaled, share]).abs().max())

    def _complete(self, index: int, part: PartName, writers: list[Writer]) -> bool:
        """With all writers zero the part adds nothing."""
        layer = self.inputs.stack.layer(index)
        zero = {w.name: torch.zeros_like(layer.get_parameter(w.name)) for w in writers}
        return not bool(self._adds(index, part, zero).any())


def output_module(layer: nn.Module, writers: tuple[Writer, ...]) -> str | None:
    """The name of the one linear module that all `writers` belong to (its weight, and a bias or none)."""
    owners = {writer.name.rpartition(".")[0] for writer in writers}
    if len(owners) != 1 or len(writers) > 2:
        return None
    name = owners.pop()
    names = {writer.name.rpartition(".")[2] for writer in writers}
    weight = layer.get_submodule(name)._parameters.get("weight")
    return name if weight is not None and weight.dim() == 2 and names <= {"weight", "bias"} else None


def folded_scale(layer: nn.Module, writers: tuple[Writer, ...], scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """The writers' tensors by name with each channel of what they write times `scale` [hidden]."""
    own = parameters_of(layer)
    return {w.name: w.scaled(own[w.name].detach(), scale) for w in writers}


def folded_map(layer: nn.Module, writers: tuple[Writer, ...], weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The writers' tensors by name with the map `weight` [hidden, hidden] behind what they write."""
    own = parameters_of(layer)
    return {w.name: w.mapped(own[w.name].detach(), weight) for w in writers}


def renamed(run: Run, weights_id: str, own: dict[str, torch.Tensor]) -> tuple[Run, dict[str, torch.Tensor]]:
    """`run` with new tensors, and these under their full names."""
    return replace(run, weights=weights_id), {f"{weights_id}.{name}": tensor for name, tensor in own.items()}


def _plain(layer: nn.Module) -> bool:
    return all(is_plain(p) and p.dtype.itemsize > 1 for p in layer.parameters())


def _near(tensor: torch.Tensor) -> float:
    return min(0.05, 200 * torch.finfo(tensor.dtype).eps)
