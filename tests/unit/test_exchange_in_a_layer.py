"""What a run exchanges in its layer during one call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from shoal.executing.exchange import Exchange


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
    with Exchange(layer, (), {}, other).in_place():
        changed = layer(x)
    assert torch.equal(changed, functional_call(layer, other, (x,)))
    assert not torch.equal(changed, plain)
    assert torch.equal(layer(x), plain)
    assert {name: id(p) for name, p in layer.named_parameters()} == before


def test_an_error_gives_them_back_as_well() -> None:
    layer, x = Layer(), torch.randn(3, 4)
    plain, wrong = layer(x), {"up.weight": torch.zeros(8, 4), "up.other": torch.zeros(1)}
    with pytest.raises(RuntimeError), Exchange(layer, (), {}, {"up.weight": torch.zeros(8, 5)}).in_place():
        layer(x)
    with pytest.raises(KeyError), Exchange(layer, (), {}, wrong).in_place():
        pass
    assert torch.equal(layer(x), plain)


def test_gradients_reach_a_tensor_that_is_exchanged() -> None:
    layer, tensor = Layer(), torch.zeros(4, 8, requires_grad=True)
    with Exchange(layer, (), {}, {"down.weight": tensor}).in_place():
        layer(torch.ones(1, 4)).sum().backward()
    assert tensor.grad is not None and tensor.grad.abs().sum() > 0
    assert layer.down.weight.grad is None


def test_a_parameter_with_two_names_is_exchanged_under_both() -> None:
    layer, x = Layer(), torch.randn(3, 4)
    layer.gate = nn.Linear(4, 8, bias=False)
    layer.gate.weight = layer.up.weight
    other = torch.randn(8, 4)
    with Exchange(layer, (), {}, {"up.weight": other}).in_place():
        assert layer.gate.weight is other and layer.up.weight is other
        changed = layer(x)
    assert torch.equal(changed, functional_call(layer, {"up.weight": other}, (x,)))
    assert layer.gate.weight is layer.up.weight and layer.up.weight is not other


def test_it_is_prepared_anew_when_a_module_was_wrapped_meanwhile() -> None:
    layer, x = Layer(), torch.randn(3, 4)
    layer.up, layer.down = nn.Identity(), nn.Linear(4, 4)
    exchange = Exchange(layer, ("down",), {}, {})
    with exchange.in_place():
        assert torch.equal(layer(x), x)
    wrapped = layer.down = nn.Sequential(layer.down)
    with exchange.in_place():
        assert torch.equal(layer(x), x)
    assert layer.down is wrapped and not torch.equal(layer(x), x)


@pytest.mark.parametrize(("own", "wanted"), [(torch.bfloat16, torch.bfloat16), (torch.uint8, torch.float32)])
def test_tensors_take_the_dtype_of_what_they_replace_where_that_holds_fractions(
    own: torch.dtype, wanted: torch.dtype
) -> None:
    layer = Layer()
    layer.scale = torch.tensor(2).to(own)
    with Exchange(layer, (), {}, {"scale": torch.tensor(0.9)}).in_place():
        assert layer.scale.dtype == wanted and torch.equal(layer.scale, torch.tensor(0.9).to(wanted))
