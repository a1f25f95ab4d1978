"""The plan's tensors, looked up anew at every use, so that the next forward sees what an optimiser has moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from shoal.models.lists import multiplied
from shoal.plan.tensors import tensors_of
from shoal.plan.ties import paired_matrices


class TensorsOf(Mapping[str, torch.Tensor]):
    """The tensors of one id by their names behind it. The names are found once, the tensors at each use."""

    def __init__(self, weights_id: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._names = tensors_of(weights_id, {name: name for name in tensors})

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class TiedTensors(Mapping[str, torch.Tensor]):
    """The matrices of another layer, parameters of two and more dimensions, by the names that they have here: the same
    within a stack, those of `paired_matrices` where the other layer is of another stack (`across`).

    Names are found whenever they are asked for, and tensors at each use: what an adapter or an optimiser puts into one
    of the two is seen.
    """

    def __init__(self, layer: nn.Module, other: nn.Module, *, across: bool = False) -> None:
        self._layer, self._other, self._across = layer, other, across
        self.places: dict[str, str] = self._found()
        """By name here the name there, as they were when names were last asked for."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._other.get_parameter(self.places[name])

    def __iter__(self) -> Iterator[str]:
        self.places = self._found()
        return iter(self.places)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _found(self) -> dict[str, str]:
        if self._across:
            return paired_matrices(multiplied(self._layer), multiplied(self._other))
        theirs = {name for name, _ in self._other.named_parameters(remove_duplicate=False)}
        held = self._layer.named_parameters(remove_duplicate=False)
        return {name: name for name, own in held if own.dim() > 1 and name in theirs}


class Converted:
    """Tensors on the device and in the dtype that a use needs.

    One that is right is handed out as it is. One that learns is converted anew each time, so that its gradient comes
    back. Of any other the converted tensor is kept until the mapping holds another one, or that one was written to (a
    write through `.data` is not seen; `BoundPlan.use` forgets what was kept).
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.device, torch.dtype], tuple[torch.Tensor, int, torch.Tensor]] = {}

    def __call__(self, name: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """`tensor`, which was looked up by `name`."""
        if tensor.dtype == dtype and tensor.device == device:
            return tensor
        if tensor.requires_grad or torch.compiler.is_compiling():
            return tensor.to(device, dtype)
        key, version = (name, device, dtype), -1 if tensor.is_inference() else tensor._version
        kept = self._kept.get(key)
        if kept is None or kept[0] is not tensor or kept[1] != version:
            kept = self._kept[key] = tensor, version, tensor.to(device, dtype)
        return kept[2]

    def like(self, name: str, tensor: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """On the device of `held`, and in its dtype where that holds fractions: packed weights are integers."""
        fractions = held.dtype.is_floating_point and tensor.is_floating_point()
        device = tensor.device if held.is_meta else held.device
        return self(name, tensor, device, held.dtype if fractions else tensor.dtype)
