"""What stands in a stock layer where a plan says something else."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, silu
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs

CHANGES = ("up", "down", "left", "right", "scale", "shift")
"""What a module of a layer may have besides its matrix, or in its place."""


class Nothing(nn.Module):
    """A part that adds nothing: zeros in the state's shape, or the residual where the part is handed it. `extra`: how
    many values the part returns beside its tensor, -1 for none and no tuple. Of several linear modules in a row
    (`passes`) the last adds nothing and the others hand on what they get."""

    def __init__(self, child: nn.Module, extra: int, passes: bool = False) -> None:
        super().__init__()
        names = list(inspect.signature(child.forward).parameters)
        self.residual = names.index("residual") if "residual" in names else None
        self.extra, self.passes = extra, passes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))
        if self.passes:
            return x
        if self.residual is None:
            out = torch.zeros_like(x)
        else:
            out = args[self.residual] if len(args) > self.residual else kwargs["residual"]
        return out if self.extra < 0 else (out, *[None] * self.extra)


class Unmade(nn.Module):
    """Stands for the matrix of keys or values that nobody reads: zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)


class Map(nn.Module):
    """W x + b, x + up(inner(x)) + b, scale x + b, or x + values[nearest key]; tokens whose norm is above the limit stay
    as they are. Source: what Shoal runs live (`shoal.executing.fitted_map`)."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape), requires_grad=False))

    def _of(self, name: str) -> Any:
        return self._parameters.get(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias, up, limit = self._of("bias"), self._of("up"), self._of("limit")
        if (keys := self._of("keys")) is not None:
            wide, states = keys.float(), x.float()
            root = states.square().mean(-1, keepdim=True).sqrt()
            states = states / root.clamp(min=torch.finfo(states.dtype).tiny)
            nearest = (states @ wide.T - wide.square().sum(-1) / 2).argmax(-1)
            out = x + self.values[nearest]
        elif (weight := self._of("weight")) is not None:
            out = linear(x, weight, bias)
        elif up is not None:
            out = x + linear(self._inner(x), up, bias)
        else:
            out = x * self.scale if bias is None else x * self.scale + bias
        if limit is None:
            return out
        return torch.where(x.float().norm(dim=-1, keepdim=True) <= limit.float(), out, x)

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        gate, down = self._of("gate"), self._of("down")
        if gate is None:
            return linear(x, down)
        gated = silu(linear(x, gate))
        return gated if down is None else gated * linear(x, down)


class Changed(nn.Module):
    """A linear module with what a run has of its own: up(down x) beside its matrix, left(right x) in its place, and
    scale and shift of what comes out.

    `base` is replaced by vLLM's own linear class later; the rest follows its split over devices (`style`): behind a
    split of rows what comes in is a part, behind a split of columns what goes out is.
    """

    def __init__(self, base: nn.Linear, shapes: Mapping[str, tuple[int, ...]], style: str, devices: int) -> None:
        super().__init__()
        self.rows = devices > 1 and style == "rowwise"
        columns = devices > 1 and style == "colwise"
        self.in_place = "left" in shapes
        self.pair = ("left", "right") if self.in_place else ("up", "down") if "up" in shapes else None
        if self.in_place:
            self.bias = None if base.bias is None else self._new((base.out_features,), 0 if columns else None, devices)
        else:
            self.base = base
        for name, shape in shapes.items():
            axis = {"up": 0, "left": 0}.get(name) if columns else None
            if name in ("scale", "shift") and shape[0] > 1 and columns:
                axis = 0
            if name in ("down", "right") and self.rows:
                axis = 1
            self.register_parameter(name, self._new(shape, axis, devices))

    @staticmethod
    def _new(shape: tuple[int, ...], axis: int | None, devices: int) -> nn.Parameter:
        sizes = [size // devices if at == axis else size for at, size in enumerate(shape)]
        made = nn.Parameter(torch.empty(sizes), requires_grad=False)
        if axis is not None:
            set_weight_attrs(made, {"weight_loader": sharded_weight_loader(axis)})
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = None if self.in_place else self.base(x)
        if self.pair is not None:
            wide, narrow = (self._parameters[name] for name in self.pair)
            inner = linear(x, narrow)
            change = linear(tensor_model_parallel_all_reduce(inner) if self.rows else inner, wide)
            made = change if made is None else made + change
        if self.in_place and self.bias is not None:
            made = made + self.bias
        if (scale := self._parameters.get("scale")) is not None:
            made = made * scale
        if (shift := self._parameters.get("shift")) is not None:
            made = made + shift
        return made


def put_around(layer: nn.Module, before: list[Map], behind: list[Map]) -> None:
    """Maps in front of a layer and behind it, under the names `before` and `behind` in it.

    Its forward may be bound to it already, where vLLM has fused it; whatever it is, it is called in between.
    """
    layer.add_module("before", nn.ModuleList(before))
    layer.add_module("behind", nn.ModuleList(behind))
    inner = layer.forward

    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for one in self.before:
            hidden_states = one(hidden_states)
        out = inner(hidden_states, *args, **kwargs)
        made = out[0] if isinstance(out, tuple) else out
        for one in self.behind:
            made = one(made)
        return (made, *out[1:]) if isinstance(out, tuple) else made

    layer.forward = types.MethodType(forward, layer)
