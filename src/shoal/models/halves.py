"""Whether an attention run and the mlp run behind it are one layer of a stock model, found by trying it.

A layer is called with functions in the place of its attention and its mlp, on random numbers and without its matrices.
What stands outside the two (norms, mostly) has random values, so that it shows which half uses which of them, and
whether the mlp reads what the attention wrote: where both read the same input, two halves are no layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from shoal.models.examine import LayerFacts
from shoal.models.parts import Makes, stubs

Tensors = Mapping[str, torch.Tensor]


class Halves:
    """One layer whose parts are exchanged for functions. `layer` is one of a model without weights that nobody else
    uses: it is changed."""

    def __init__(self, layer: nn.Module, fact: LayerFacts) -> None:
        assert fact.parts is not None
        self.layer, self.parts, self._fact = layer, fact.parts, fact
        self.children = {name: layer.get_submodule(name) for name in (*self.parts.attention, *self.parts.mlp)}
        self._exchange(None, None)
        self.outside = {name: tuple(one.shape) for name, one in layer.state_dict().items()}
        """The shapes of the tensors that are in neither part."""

    def values(self, seed: int) -> dict[str, torch.Tensor]:
        """Random values for the tensors outside the parts."""
        generator = torch.Generator().manual_seed(seed)
        return {name: _random(shape, generator) for name, shape in self.outside.items()}

    def used(self, attention: Makes | None, mlp: Makes | None) -> frozenset[str]:
        """The tensors outside the parts on whose values it depends what the layer makes."""
        base, other = self.values(0), self.values(1)
        before = self.run(base, attention, mlp)
        changed = {name: self.run(base | {name: other[name]}, attention, mlp) for name in self.outside}
        return frozenset(name for name, made in changed.items() if not torch.equal(made, before))

    def run(self, values: Tensors, attention: Makes | None, mlp: Makes | None, x: Any = None) -> torch.Tensor:
        """What the layer makes of the state `x` (default: a random one) with functions for its parts; None for a part
        that adds nothing."""
        assert self._fact.called is not None
        generator = torch.Generator().manual_seed(2)
        args, kwargs = (_filled(given, generator) for given in self._fact.called)
        if x is not None:
            args, kwargs = ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})
        self._exchange(attention, mlp)
        tables = {name: _filled(table, generator) for name, table in self.layer.named_buffers()}
        with torch.no_grad():
            out = functional_call(self.layer, {**tables, **values}, args, kwargs)
        found: torch.Tensor = out if isinstance(out, torch.Tensor) else out[0]
        return found

    def _exchange(self, attention: Makes | None, mlp: Makes | None) -> None:
        own: dict[str, Any] = self.layer._modules
        own.update(self.children)
        made = stubs(self.layer, self.parts.attention, self._fact.returns, attention)
        own.update(made | stubs(self.layer, self.parts.mlp, self._fact.returns, mlp))


def follows(first: Halves, second: Halves, *, same: bool) -> frozenset[str] | str:
    """Is the layer of `first` with the mlp of `second` the attention of `first` and behind it the mlp of `second`?

    Then the tensors outside the parts that come with the mlp; otherwise why not. `same`: both are one layer, tensors
    included, so that nothing is exchanged.
    """
    if first.outside != second.outside:
        return f"they hold other tensors: {min(set(first.outside.items()) ^ set(second.outside.items()))[0]}"
    ours = first.values(4)
    theirs = ours if same else second.values(5)
    with_mlp = first.used(None, _thinks) - first.used(_writes, None)
    both = {name: theirs[name] if name in with_mlp else ours[name] for name in ours}
    one_by_one = second.run(theirs, None, _thinks, first.run(ours, _writes, None))
    if torch.allclose(first.run(both, _writes, _thinks), one_by_one, rtol=1e-6, atol=1e-6):
        return with_mlp
    alone = first.run(ours, None, _thinks, first.run(ours, _writes, None))
    if torch.allclose(first.run(ours, _writes, _thinks), alone, rtol=1e-6, atol=1e-6):
        return "what stands outside their attention and mlp cannot be taken apart"
    return "its mlp does not read what its attention wrote"


def _writes(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(3 * x + 1)


def _thinks(x: torch.Tensor) -> torch.Tensor:
    return torch.cos(2 * x)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _filled(value: Any, generator: torch.Generator) -> Any:
    """The same with numbers on the CPU in the place of tensors: random fractions, integers 0, and True."""
    if isinstance(value, torch.Tensor):
        if value.dtype.is_floating_point:
            return _random(tuple(value.shape), generator)
        return torch.full(tuple(value.shape), value.dtype == torch.bool, dtype=value.dtype)
    if isinstance(value, dict):
        return {key: _filled(inner, generator) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_filled(inner, generator) for inner in value)
    return value
