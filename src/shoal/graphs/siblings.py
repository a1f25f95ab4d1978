"""Linear modules that read one input, computed as one matrix product."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from shoal.graphs._graph import Graph, nothing_fits, plain_linears, require_plain, swap
from shoal.graphs._reads import Reads, observed


def siblings(model: nn.Module) -> Graph:
    """Compute the linear modules that read one input as one matrix product: queries, keys and values, or gate and up.

    For modules with W_i: [out_i, in] that are called with one tensor x: [.., in] the matrices are laid one below the
    other, W: [sum of out_i, in]; the first that is called computes x W^T (with the biases, where all have one), and
    each is given its columns. Which modules read one tensor is seen in one forward. Each weight stays the parameter it
    was, as a view of W, so no name changes and nothing is held twice. Where the same tensor does not come, where
    gradients are recorded, and inside torch.compile a module multiplies by itself, as before.

    The products may be summed in another order than by themselves, which depends on the machine and the shapes; the
    handle says whether the logits were the same bits.

    Raises `UsageError` U662 for a model without such modules, or whose matrices are quantised, sharded, offloaded or
    wrapped by peft.

    Source: Pope et al. 2022, "Efficiently Scaling Transformer Inference", arXiv 2211.05102, which fuses the projections
    of parallel layers; FasterTransformer's fused QKV product.

    How we differ: no fused checkpoint and no list of families; attention and mlp of a layer that computes them in
    parallel are joined where they read one tensor, in one product with the others.
    """
    require_plain(model, "siblings")
    groups = _groups(observed(model), model)
    if not groups:
        raise nothing_fits("siblings", "two linear modules that read one input", {})
    return _Joined([_Group(members) for members in groups])


def _groups(reads: Reads, model: nn.Module) -> list[tuple[nn.Linear, ...]]:
    """Modules that are called with one and the same tensor, always together."""
    linears = plain_linears(model)
    by_input: dict[int, dict[int, nn.Linear]] = {}
    for use in reads.products():
        if id(use.weight) in linears:
            module = linears[id(use.weight)][1]
            by_input.setdefault(use.read, {})[id(module)] = module
    together: dict[int, set[frozenset[int]]] = {}
    for members in by_input.values():
        for one in members:
            together.setdefault(one, set()).add(frozenset(members))
    found: dict[frozenset[int], tuple[nn.Linear, ...]] = {}
    for members in by_input.values():
        if all(len(together[one]) == 1 for one in members):
            for alike in _alike(list(members.values())):
                found[frozenset(map(id, alike))] = alike
    return list(found.values())


def _alike(members: list[nn.Linear]) -> list[tuple[nn.Linear, ...]]:
    """Those of one dtype and device that all have a bias or all have none; two or more each."""
    kinds: dict[Any, list[nn.Linear]] = {}
    for one in members:
        kinds.setdefault((one.weight.dtype, one.weight.device, one.bias is None), []).append(one)
    return [tuple(group) for group in kinds.values() if len(group) > 1]


class _Joined(Graph):
    def __init__(self, groups: list[_Group]) -> None:
        super().__init__("siblings", sum(len(group.members) for group in groups), {})
        self.groups = groups

    def put(self) -> None:
        for group in self.groups:
            group.put()

    def take_away(self) -> None:
        for group in self.groups:
            group.take_away()


class _Held(threading.local):
    """What one thread has computed for the modules that have not been called yet."""

    read: torch.Tensor | None = None
    version = 0
    pieces: dict[int, torch.Tensor]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return _Held()


class _Group:
    """Modules that read one tensor, with their matrices in one."""

    def __init__(self, members: tuple[nn.Linear, ...]) -> None:
        self.members = members
        self.sizes = [one.out_features for one in members]
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self._expected: list[tuple[torch.Tensor, int]] = []
        self._held = _Held()

    def put(self) -> None:
        self.weight = self._laid_together([one.weight for one in self.members])
        biases = [one.bias for one in self.members if one.bias is not None]
        self.bias = self._laid_together(biases) if biases else None
        own = [p for one in self.members for p in (one.weight, one.bias) if p is not None]
        self._expected = [(p, p.data_ptr()) for p in own]
        for at, one in enumerate(self.members):
            one.__dict__["forward"] = partial(self._forward, at)

    def _laid_together(self, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = torch.cat([p.data for p in parameters])
        for parameter, rows in zip(parameters, whole.split(self.sizes), strict=True):
            swap(parameter, rows)
        return whole

    def take_away(self) -> None:
        for parameter, _ in self._expected:
            swap(parameter, parameter.data.clone(memory_format=torch.contiguous_format))
        for one in self.members if self._expected else ():
            one.__dict__.pop("forward", None)
        self.weight, self.bias, self._expected, self._held = None, None, [], _Held()

    def _forward(self, at: int, x: torch.Tensor) -> torch.Tensor:
        one, held = self.members[at], self._held
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not self._is_whole():
            return linear(x, one.weight, one.bias)
        version = -1 if x.is_inference() else x._version
        if held.read is not x or held.version != version or at not in held.pieces:
            assert self.weight is not None
            made = linear(x, self.weight, self.bias).split(self.sizes, dim=-1)
            held.read, held.version, held.pieces = x, version, dict(enumerate(made))
        piece = held.pieces.pop(at)
        if not held.pieces:
            held.read = None
        return piece

    def _is_whole(self) -> bool:
        """Whether the parameters are still the rows of the joined matrix: a plan lends others for the length of a call,
        and `model.to` moves them."""
        own = [p for one in self.members for p in (one._parameters["weight"], one._parameters["bias"]) if p is not None]
        return all(p is q and p.data_ptr() == at for p, (q, at) in zip(own, self._expected, strict=True))
