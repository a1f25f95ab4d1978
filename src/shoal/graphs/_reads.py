"""Which matrices read which state, probed: one forward of a few tokens in which every call of torch is noted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from shoal.models.calls import device_of
from shoal.models.evaluating import evaluating

_VIEWS = frozenset({"view", "reshape", "flatten", "unsqueeze", "squeeze"})
"""Calls whose result holds the same rows where its last dimension is the same."""
TOKENS = 3


@dataclass(frozen=True)
class Use:
    """One call that took a tensor."""

    call: str
    """The name of torch's function."""
    weight: torch.Tensor | None = None
    """Of a product x W^T: the matrix that x was multiplied with."""
    read: int = 0
    """Of a product: the identity of what the matrix read."""
    rows: int = 0
    """The same, where views of one tensor are that tensor."""


class Reads(TorchFunctionMode):
    """What each tensor of one forward was used for."""

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[int, list[Use]] = {}
        self._rows: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []  # so that no identity is given away twice
        self.made: list[tuple[nn.Module, torch.Tensor]] = []
        """(module, its output) of the modules that were asked for, in the order in which they ran."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, name = list(_tensors((args, kwargs))), getattr(func, "__name__", str(func))
        known = {id(tensor) for tensor in given}
        new = [tensor for tensor in _tensors(out) if id(tensor) not in known]
        in_place = name.endswith("_") and not name.endswith("__")
        if not new and not in_place:  # a shape was asked for, or the tensor itself came back
            return out
        self._kept += [*given, *new]
        if given and new and _same_rows(name, args, given[0], new[0]):
            self._rows[id(new[0])] = self._rows.get(id(given[0]), id(given[0]))
            return out
        use = Use(name)
        if func is torch.nn.functional.linear:
            read, weight = given[:2]
            use = Use(name, weight, id(read), self._rows.get(id(read), id(read)))
        for tensor in given:
            self._uses.setdefault(self._rows.get(id(tensor), id(tensor)), []).append(use)
        return out

    def of(self, tensor: torch.Tensor) -> list[Use]:
        """The calls that took `tensor` or a view of its rows."""
        return self._uses.get(id(tensor), [])

    def products(self) -> list[Use]:
        """Every product with a matrix, in the order in which they ran, each once."""
        found = {id(use): use for uses in self._uses.values() for use in uses if use.weight is not None}
        return list(found.values())


def observed(model: nn.Module, watched: Iterable[nn.Module] = ()) -> Reads:
    """What a forward of the live model over a few tokens reads, a running plan's included; `made` holds the outputs of
    the modules `watched`."""
    reads = Reads()
    handles = [module.register_forward_hook(partial(_note, reads)) for module in watched]
    try:
        with evaluating(model), reads:
            ids = torch.arange(1, 1 + TOKENS, device=device_of(model))[None]
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return reads


def _note(reads: Reads, module: nn.Module, _: Any, out: Any) -> None:
    if isinstance(out, torch.Tensor):
        reads.made.append((module, out))


def _same_rows(name: str, args: tuple[Any, ...], given: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether `new` holds rows of `given` as they are."""
    if new.shape[-1:] != given.shape[-1:]:
        return False
    if name == "__getitem__":  # an index that is a tensor may change the order of the columns
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(one is None or one is ... or isinstance(one, slice | int) for one in index)
    return name in _VIEWS


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
