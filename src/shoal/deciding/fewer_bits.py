"""Weights of a layer in fewer bits, in the place of its own for the length of a call, or for some of its tokens.

The quantiser is the plain one: symmetric, one scale for each output row, the largest magnitude of the row at the end of
the range. What is kept is the whole numbers, int8, and the scales; they are multiplied again for each call, so nothing
is saved but what `share` counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shoal.deciding.choices import Picked
from shoal.models.linear import is_linear, is_transposed

MOST = 8
"""Bits of the widest copy."""


def quantised(weight: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers, int8 of the shape of `weight`, and the scale of each output row, float32 with 1 along `dim`, the
    dimension of the inputs: |w - n s| <= s / 2, s = max |w| / (2^(bits - 1) - 1)."""
    most = 2 ** (bits - 1) - 1
    held = weight.detach().float()
    scale = held.abs().amax(dim, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / most
    return (held / scale).round().clamp(-most, most).to(torch.int8), scale


def matrices(layer: nn.Module) -> dict[str, nn.Module]:
    """The linear modules of a layer by name, past what peft has wrapped around them."""
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        if is_linear(module) and not any(name.startswith(f"{one}.") for one in found):
            found[name] = getattr(module, "base_layer", module)
    return found


@dataclass
class FewerBits:
    """The copies of the layers of one model, made when they are first used, and anew where a weight has changed."""

    kept: dict[tuple[Any, ...], tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def of(self, key: tuple[Any, ...], module: nn.Module, bits: int) -> torch.Tensor:
        """The weight of a linear module in so many bits, in its dtype; `key` names the module. Where the weight learns,
        its gradient is that of the copy."""
        weight: Any = module._parameters["weight"]
        version = -1 if weight.is_inference() else weight._version
        found = self.kept.get((*key, bits))
        if found is None or found[0] is not weight or found[1] != version:
            codes, scale = quantised(weight, bits, 0 if is_transposed(module) else -1)
            found = self.kept[*key, bits] = weight, version, codes, scale
        copy = (found[2] * found[3]).to(weight.dtype)
        learns = torch.is_grad_enabled() and weight.requires_grad
        return weight + (copy - weight).detach() if learns else copy


@dataclass(slots=True, eq=False)
class InBits:
    """One choice of bits for the tokens of a call."""

    copies: FewerBits
    key: tuple[Any, ...]
    """Of the run."""
    bits: tuple[int | None, ...]
    """By place; None: the weights as they are."""
    picked: Picked

    @contextmanager
    def around(self, layer: nn.Module) -> Iterator[None]:
        """Every matrix of the layer answers with the bits of each token."""
        sole = self.picked.sole
        with ExitStack() as stack:
            for name, module in matrices(layer).items():
                if sole is None:
                    handle = module.register_forward_hook(lambda m, args, out, n=name: self._mixed(n, m, args, out))
                    stack.callback(handle.remove)
                elif (bits := self.bits[sole]) is not None:
                    stack.enter_context(_with_weight(module, self.copies.of((*self.key, name), module, bits)))
            yield

    def _mixed(self, name: str, module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        """`out` is what the module makes with its own weight."""
        made, whole = None, out
        for place, bits in enumerate(self.bits):
            one = whole
            if bits is not None:
                with _with_weight(module, self.copies.of((*self.key, name), module, bits)):
                    one = module.forward(*args)
            if self.picked.weights is not None:
                part = one * _laid_out(self.picked.weights[..., place : place + 1], one).to(one)
                made = part if made is None else made + part
            else:
                mine = _laid_out((self.picked.which == place)[..., None], one)
                made = one if made is None else torch.where(mine, one, made)
        assert made is not None
        return made


@contextmanager
def _with_weight(module: nn.Module, weight: torch.Tensor) -> Iterator[None]:
    held: dict[str, Any] = module._parameters
    before = held["weight"]
    held["weight"] = weight
    try:
        yield
    finally:
        held["weight"] = before


def _laid_out(each: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """[batch or 1, tokens, 1] as `made` is laid out, which may be [batch x tokens, numbers]."""
    each = each.to(made.device)
    if made.dim() == each.dim():
        return each
    return each.expand(made.shape[0] // each.shape[1], -1, -1).reshape(-1, 1)
