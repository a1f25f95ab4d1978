"""Around the call of a layer whose mlp uses the first of its neurons, as many for each token as were chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shoal.deciding.choices import Picked
from shoal.models.neuron_places import NeuronPlaces
from shoal.models.neurons import with_neurons
from shoal.plan.spec import NeuronSpec


@dataclass(slots=True, eq=False)
class NarrowerMlp:
    """One choice of widths."""

    neurons: NeuronSpec
    """Of the base layer; what the plan's own tensors make in its place may be another number."""
    places: NeuronPlaces | None
    """Where each neuron stands, if that is known."""
    shares: tuple[float, ...]
    picked: Picked
    factors: torch.Tensor | None = None
    """What kept neurons are multiplied by, from one width to the next, [batch or 1, tokens, shares]; None: by 1."""
    cut: bool = False
    """Whether the matrices were shorter in the call that is over."""

    @contextmanager
    def around(self, layer: nn.Module) -> Iterator[None]:
        """Neurons beyond a token's width are 0 where the last matrix reads them. Where all tokens have one width and
        nothing learns, the matrices are shorter for the length of the call."""
        reader = layer.get_submodule(self.neurons.reads.name.rpartition(".")[0])
        sole = self.picked.sole
        tensors = {} if sole is None or self.shares[sole] >= 1 else self._first(layer, self.shares[sole])
        self.cut, whole = bool(tensors), self._count(layer)
        with ExitStack() as stack:
            if self.cut:
                stack.enter_context(with_neurons(layer, tensors))
            if self.factors is not None or not (self.cut or (sole is not None and self.shares[sole] >= 1)):
                handle = reader.register_forward_pre_hook(lambda _, args: self._kept(args, whole))
                stack.callback(handle.remove)
            yield

    def _count(self, layer: nn.Module) -> int | None:
        """Neurons of the layer as it stands, before it is cut; None where another module wraps the matrix."""
        module, _, leaf = self.neurons.reads.name.rpartition(".")
        held = layer.get_submodule(module)._parameters.get(leaf)
        return None if held is None else int(held.shape[self.neurons.reads.dim])

    def _first(self, layer: nn.Module, share: float) -> Mapping[str, torch.Tensor]:
        """The tensors of the first neurons, views where they can be; nothing where they cannot be taken."""
        if self.places is None:
            return {}
        held = {}
        for one in self.neurons.tensors:
            module, _, leaf = one.name.rpartition(".")
            tensor = layer.get_submodule(module)._parameters.get(leaf)
            if tensor is None or tensor.is_meta or not tensor.is_floating_point():
                return {}
            held[one.name] = tensor
        reads = self.neurons.reads
        count = int(held[reads.name].shape[reads.dim])
        if count != self.neurons.count and any(places.shape[1] > 1 for places in self.places.places.values()):
            return {}  # where the second place of each neuron begins is known of the base layer alone
        return self.places.first(held, width(count, share))

    def _kept(self, args: tuple[Any, ...], whole: int | None) -> tuple[Any, ...]:
        made: torch.Tensor = args[0]
        count = made.shape[-1] if whole is None else whole
        widths = torch.tensor([width(count, share) for share in self.shares], device=made.device)
        place = torch.arange(made.shape[-1], device=made.device)
        if self.factors is not None:
            group = torch.bucketize(place, widths, right=True).clamp(max=len(widths) - 1)
            made = made * self._over(made, self.factors[..., group])
        if self.cut:
            return (made, *args[1:])
        if self.picked.weights is not None:
            first = (place < widths[:, None]).to(self.picked.weights.dtype)  # [shares, neurons]
            return (made * self._over(made, self.picked.weights.to(made.device) @ first), *args[1:])
        kept = place < widths[self.picked.which.to(made.device)][..., None]
        return (torch.where(self._over(made, kept), made, 0.0), *args[1:])

    def _over(self, made: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
        """[batch or 1, tokens, neurons] as `made` is laid out, which may be [batch x tokens, neurons]."""
        found = each.to(made) if each.is_floating_point() else each.to(made.device)
        if made.dim() == found.dim():
            return found
        rows = made.shape[0] // found.shape[1]
        return found.expand(rows, -1, -1).reshape(made.shape)


def width(count: int, share: float) -> int:
    """How many of so many neurons a share of them is, at least one."""
    return max(1, round(share * count))
