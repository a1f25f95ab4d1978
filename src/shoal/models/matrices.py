"""The weight matrices of each layer, or of its attention or mlp: what measures without text look at."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from shoal.errors import UsageError
from shoal.models.opened import open_model
from shoal.models.packed import is_subclass
from shoal.plan.steps import PartName

Matrices = list[list[tuple[str, nn.Parameter]]]
"""For each layer (name within the layer, parameter); vectors such as norms and biases are left out."""


def layer_matrices(model: nn.Module, what: str, *, part: PartName = "layer", stack: str | None = None) -> Matrices:
    """The parameters with two or more dimensions, by layer; none for a layer without such a part.

    Raises U534 for weights that are not here to be read (offloaded, or packed by a quantiser) and U531 when no layer
    has the part. `what` names the measure.
    """
    found = open_model(model).stack(stack)
    facts = None if part == "layer" else open_model(model).facts(found.name).layers
    matrices: Matrices = []
    for index in range(found.depth):
        layer = found.layer(index)
        parts = None if facts is None else facts[index].parts
        names = ("",) if facts is None else () if parts is None else getattr(parts, part)
        own = [
            (f"{name}.{inner}" if name else inner, parameter)
            for name in names
            for inner, parameter in layer.get_submodule(name).named_parameters()
            if parameter.dim() >= 2
        ]
        _require_readable(layer, own, what, index)
        matrices.append(own)
    if not any(matrices):
        raise UsageError(f"{what} finds no matrices in any {part} of this model; measure with part=layer", code="U531")
    return matrices


def planes(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Its matrices in float32, one at a time: a stack of experts [experts, rows, columns] holds several."""
    for plane in parameter.detach().reshape(-1, *parameter.shape[-2:]):
        yield plane.float()


def _require_readable(layer: nn.Module, own: list[tuple[str, nn.Parameter]], what: str, index: int) -> None:
    packed = [name for name, buffer in (*layer.named_buffers(), *layer.named_parameters()) if _packed(buffer)]
    away = [name for name, parameter in own if parameter.is_meta]
    if packed or away:
        name, why = (packed[0], "quantised") if packed else (away[0], "offloaded")
        raise UsageError(
            f"{what} reads the weights, but {name} of layer {index} is {why}; load the model whole in a float dtype, "
            "or use a measure that only runs it",
            code="U534",
        )


def _packed(tensor: torch.Tensor) -> bool:
    """Integer matrices hold weights in a code of their own; small buffers count positions."""
    return is_subclass(tensor) or (tensor.dim() >= 2 and not tensor.is_floating_point() and tensor.numel() > 4096)
