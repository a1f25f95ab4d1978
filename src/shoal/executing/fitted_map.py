"""What a map computes from the tensors that a plan names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from shoal.executing.looked_up import Converted
from shoal.plan.tensors import MAP_TENSORS


class FittedMap:
    """y = x W^T + b, y = x + up(inner(x)) + b, y = scale * x + b or y = x + values[nearest entry]; x is [..., hidden].

    With a limit, tokens whose norm is larger are handed on as they are: an attention sink, a hundred times as long as
    the others, would be moved by more than a layer ever moves it. This asks for no position, so it holds with any cache
    and padding. The tensors are used in the dtype and on the device of x: the layers of one model may be on several
    devices and hold weights in a code of their own, and a map stands between two of them.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """`tensors` by their names, see `shoal.plan.tensors`; they are looked up in every call."""
        self.tensors, self._converted = tensors, Converted()
        self._names = [name for name in MAP_TENSORS if name in tensors]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        # between two keys float32 decides, in every model
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dtypes = {name: wide if name == "keys" else hidden.dtype for name in self._names}
        found = {name: self._converted(name, self.tensors[name], hidden.device, own) for name, own in dtypes.items()}
        weight, scale, up, bias, limit = (found.get(name) for name in ("weight", "scale", "up", "bias", "limit"))
        if "keys" in found:
            out = hidden + found["values"][nearest_entry(hidden, found["keys"])]
        elif weight is not None:
            out = nn.functional.linear(hidden, weight, bias)
        elif up is not None:
            out = hidden + nn.functional.linear(_inner(hidden, found.get("gate"), found.get("down")), up, bias)
        else:
            assert scale is not None  # check P112
            out = hidden * scale if bias is None else hidden * scale + bias
        if limit is None:
            return out
        # half precision cannot hold the square of an outlier
        return torch.where(hidden.float().norm(dim=-1, keepdim=True) <= limit.float(), out, hidden)


def nearest_entry(hidden: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The number of the key [entries, hidden] that is nearest to each state [..., hidden], scaled to a root mean square
    of 1, as [...]."""
    states = scaled(hidden.to(keys.dtype))
    return (states @ keys.T - keys.square().sum(-1) / 2).argmax(-1)


def scaled(states: torch.Tensor) -> torch.Tensor:
    """States [..., hidden] with a root mean square of 1: what a norm in front of a part leaves of them, without its
    weights."""
    size = states.square().mean(-1, keepdim=True).sqrt()
    return states / size.clamp(min=torch.finfo(states.dtype).tiny)


def _inner(hidden: torch.Tensor, gate: torch.Tensor | None, down: torch.Tensor | None) -> torch.Tensor:
    """down(x), silu(gate(x)), or their product."""
    down_x = None if down is None else nn.functional.linear(hidden, down)
    gate_x = None if gate is None else nn.functional.silu(nn.functional.linear(hidden, gate))
    if down_x is None or gate_x is None:
        found = gate_x if down_x is None else down_x
        assert found is not None  # check P112
        return found
    return gate_x * down_x
