"""Which axis of a layer's arguments counts queries, and which argument is the mask: found by comparing two passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from shoal.executing.calls import Call, Place, argument, with_argument
from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating
from shoal.models.stacks import Stack

Path = tuple[Place, ...]
_PAST = 3

__all__ = ["Arguments", "Call", "argument", "with_argument"]


class Arguments:
    """Of every layer: the axis of queries for each tensor that it is called with, and the place of its mask."""

    def __init__(self, model: Any, stack: Stack) -> None:
        """Runs `model` twice on a few tokens, behind a short prefill in a left-padded batch of two."""
        short, long = _watch(model, stack, 2), _watch(model, stack, 4)
        self.axes: list[dict[Path, int]] = []
        self.masks: list[Place | None] = []
        self.boolean: list[bool] = []
        for one, other in zip(short, long, strict=True):
            axes: dict[Path, int] = {}
            mask, boolean = None, False
            for path, tensor in _tensors(one):
                changed = [
                    n for n, (a, b) in enumerate(zip(tensor.shape, other_shape(other, path), strict=False)) if a != b
                ]
                queries = [n for n in changed if tensor.shape[n] == 2]
                if tensor.dim() == 4 and len(path) == 1 and changed == [2, 3] and queries == [2]:
                    mask, boolean = path[0], tensor.dtype == torch.bool
                elif queries:
                    axes[path] = queries[0]
            self.axes.append(axes)
            self.masks.append(mask)
            self.boolean.append(boolean)

    def joined(self, layer: int, calls: list[Call]) -> Call:
        """The calls as one, behind each other along the axis of queries; what has none is taken from the last."""
        args, kwargs = calls[-1]

        def join(path: Path, values: list[Any]) -> Any:
            last = values[-1]
            if isinstance(last, tuple | list):
                return type(last)(join((*path, n), [v[n] for v in values]) for n in range(len(last)))
            axis = self.axes[layer].get(path)
            if axis is None or not all(isinstance(value, torch.Tensor) for value in values):
                return last
            return torch.cat(values, axis)

        return (
            tuple(join((n,), [c[0][n] for c in calls]) for n in range(len(args))),
            {name: join((name,), [c[1][name] for c in calls]) for name in kwargs},
        )

    def cut(self, layer: int, call: Call, queries: int) -> Call:
        """The call for the first `queries` of its queries."""

        def keep(path: Path, value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(keep((*path, n), v) for n, v in enumerate(value))
            axis = self.axes[layer].get(path)
            return value.narrow(axis, 0, queries) if axis is not None and isinstance(value, torch.Tensor) else value

        args, kwargs = call
        return tuple(keep((n,), v) for n, v in enumerate(args)), {name: keep((name,), v) for name, v in kwargs.items()}


def other_shape(call: Call, path: Path) -> tuple[int, ...]:
    """The shape of the tensor at `path`; empty when there is none."""
    value: Any = argument(call, path[0])
    for step in path[1:]:
        value = value[step] if isinstance(value, tuple | list) and isinstance(step, int) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _tensors(call: Call) -> list[tuple[Path, torch.Tensor]]:
    def under(path: Path, value: Any) -> list[tuple[Path, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            return [(path, value)]
        if isinstance(value, tuple | list):
            return [found for n, v in enumerate(value) for found in under((*path, n), v)]
        return []

    given: list[tuple[Place, Any]] = [*enumerate(call[0]), *call[1].items()]
    return [found for at, value in given for found in under((at,), value)]


def _watch(model: Any, stack: Stack, queries: int) -> list[Call]:
    calls: dict[int, Call] = {}
    handles = [
        stack.layer(i).register_forward_pre_hook(_noting(calls, i), with_kwargs=True) for i in range(stack.depth)
    ]
    ids = torch.zeros((2, _PAST + queries), dtype=torch.long, device=device_of(model))
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    try:
        past = DynamicCache(config=model.config)
        with evaluating(model):
            model(input_ids=ids[:, :_PAST], attention_mask=mask[:, :_PAST], past_key_values=past, use_cache=True)
            model(input_ids=ids[:, _PAST:], attention_mask=mask, past_key_values=past, use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    return [calls[i] for i in range(stack.depth)]


def _noting(calls: dict[int, Call], index: int) -> Any:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[index] = (
            tuple(None if isinstance(a, Cache) else a for a in args),
            {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()},
        )

    return note
