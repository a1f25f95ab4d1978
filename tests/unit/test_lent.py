"""Tensors that stand in for a layer's own during one call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from shoal.executing.lent import has_ties, lent


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = x + self.scale * self.down(self.up(x))
        return found


def test_the_layer_computes_with_the_tensors_and_has_its_own_back() -> None:
    layer, x = Layer(), torch.randn(3, 4)
    plain, before = layer(x), {name: id(p) for name, p in layer.named_parameters()}
    other = {"down.weight": torch.randn(4, 8), "up.bias": torch.randn(8), "scale": torch.tensor(0.5)}
    with lent(layer, other):
        changed = layer(x)
    assert torch.equal(changed, functional_call(layer, other, (x,)))
    assert not torch.equal(changed, plain)
    assert torch.equal(layer(x), plain)
    assert {name: id(p) for name, p in layer.named_parameters()} == before


def test_an_error_gives_them_back_as_well() -> None:
    layer, x = Layer(), torch.randn(3, 4)
    plain = layer(x)
    with pytest.raises(RuntimeError), lent(layer, {"up.weight": torch.zeros(8, 5)}):
        layer(x)
    with pytest.raises(KeyError), lent(layer, {"up.weight": torch.zeros(8, 4), "up.scale": torch.zeros(1)}):
        pass
    assert torch.equal(layer(x), plain)


def test_gradients_reach_a_tensor_that_is_lent() -> None:
    layer, tensor = Layer(), torch.zeros(4, 8, requires_grad=True)
    with lent(layer, {"down.weight": tensor}):
        layer(torch.ones(1, 4)).sum().backward()
    assert tensor.grad is not None and tensor.grad.abs().sum() > 0
    assert layer.down.weight.grad is None


def test_a_parameter_with_two_names_is_seen() -> None:
    layer = Layer()
    assert not has_ties(layer)
    layer.gate = nn.Linear(4, 8, bias=False)
    layer.gate.weight = layer.up.weight
    assert has_ties(layer)
