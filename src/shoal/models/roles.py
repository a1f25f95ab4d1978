"""What the matrices of an attention make: queries, keys, values, or what the layer adds.

A layer is called once over a cache and an attention function that only listen, while the answer of every module with a
matrix carries a mark of its own. Which marks torch's graph leads to from the queries, keys and values says what each
module makes. No value is read, so a model on the meta device tells as much, and no name of a module is known.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shoal.models.listening import Call, Heard, KeysValues, heard, no_context
from shoal.models.parts import INDEX_NAMES
from shoal.plan.sources import Product

FAILS = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError)
"""What a layer may raise that is probed in a way in which its model does not call it."""


@dataclass(frozen=True, slots=True)
class HeadRoles:
    """The modules with matrices in one layer's attention, by what they make; names within the layer. One that makes
    several things (a fused `qkv`, the latent of keys and values) stands at each."""

    queries: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    output: tuple[str, ...]
    """Those behind the attention, and gates beside it: what changes the layer's answer past the attention."""
    rotated: bool = False
    """Whether keys turn with tables of positions that the layer is given."""
    apart: bool = True
    """Whether the attention's keys are the stored keys and its values the stored values; not so where a latent state of
    both is stored. True where the layer works its attention out itself."""
    any_heads: bool = False
    """Whether the layer runs with fewer heads of keys and values, through transformers' attention interface."""
    widths: Mapping[str, int] = field(default_factory=dict)
    """The last dimension of what each module answers, where that is one tensor."""

    def makes(self, module: str) -> frozenset[Product]:
        """What a module makes of queries, keys and values; nothing for one that also does something else, or whose
        answer is no tensor: it is called whatever a run uses."""
        if module in self.output or module not in self.widths:
            return frozenset()
        products: tuple[Product, ...] = ("queries", "keys", "values")
        return frozenset(name for name in products if module in getattr(self, name))

    @property
    def products(self) -> tuple[str, ...]:
        """The modules that make queries, keys or values, and nothing else."""
        return tuple(name for name in dict.fromkeys((*self.queries, *self.keys, *self.values)) if self.makes(name))

    def unused(self, taken: Set[Product]) -> tuple[str, ...]:
        """The modules that make nothing but what a run takes from another layer."""
        return tuple(name for name in self.products if self.makes(name) <= taken)


def find_roles(layer: nn.Module, cache_at: int | str | None, call: Call) -> HeadRoles | None:
    """The roles in the attention of a layer that is called as in `call`; None where they cannot be told, as beside
    cross-attention.

    Where a layer works its attention out itself nobody is told of queries: what it calls before it stores, and what
    changes its answer although keys and values stay, makes them.
    """
    if cache_at is None:
        return None
    inside = list(_matrices(layer))
    try:
        with warnings.catch_warnings(), torch.enable_grad(), _marked(layer, inside) as marks:
            warnings.simplefilter("ignore")  # FSDP2 warns of what it would do in a backward pass, and there is none
            tables, marked = _with_marked_tables(call)
            seen = heard(layer, cache_at, marked, given=marks.cached, attend=no_context, into=marks.heard)
            if len(seen.stored) != 1:
                return None
            keys, values = (marks.behind(one) for one in seen.stored[0])
            rotated = bool(leaves_of(seen.stored[0][0]) & {id(one) for one in tables})
            apart = True
            if seen.asked:
                apart = all(marks.halves(made) == {half} for half, made in enumerate(seen.asked[0][1:]))
                found = keys, values, marks.behind(seen.asked[0][0]), marks.behind(seen.out)
            else:
                early = set(marks.early)
                given = seen.stored[0][0].detach(), seen.stored[0][1].detach()
                out = marks.behind(heard(layer, cache_at, call, given=given).out)
                found = keys, values, out & early, out - early
            heads = bool(seen.asked) and _runs_with_one_head(layer, cache_at, call, keys, values)
    except FAILS:
        return None
    made_keys, made_values, made_queries, output = (tuple(n for n in inside if n in one) for one in found)
    return HeadRoles(made_queries, made_keys, made_values, output, rotated, apart, heads, marks.widths)


def _runs_with_one_head(layer: nn.Module, cache_at: int | str, call: Call, keys: set[str], values: set[str]) -> bool:
    """Whether the layer stores one head and asks for attention over it where the modules of keys and values make so
    much."""
    alone = [next(iter(one)) for one in (keys - values, values - keys) if len(one) == 1]
    if len(alone) < 2 or len(keys | values) != 2:
        return False
    plain = heard(layer, cache_at, call, attend=no_context).stored[0]
    handles = [
        layer.get_submodule(name).register_forward_hook(lambda _, __, out, size=states.shape[-1]: out[..., :size])
        for name, states in zip(alone, plain, strict=True)
    ]
    try:
        seen = heard(layer, cache_at, call, attend=no_context)
    except FAILS:
        return False
    finally:
        for handle in handles:
            handle.remove()
    return plain[0].shape[1] > 1 and all(one.shape[1] == 1 for one in (*seen.stored[0], *seen.asked[0][1:]))


def _matrices(layer: nn.Module) -> Iterator[str]:
    """The modules with matrices of their own within the child that knows its place."""
    for name, child in layer.named_children():
        if any(index in one.__dict__ for one in child.modules() for index in INDEX_NAMES):
            wrapped: list[str] = []
            for inner, module in child.named_modules(prefix=name):
                if inner.startswith(tuple(wrapped)):
                    continue
                if isinstance(getattr(module, "base_layer", None), nn.Module):  # peft's, around the module of that name
                    wrapped.append(f"{inner}.")
                    yield inner
                elif any(p is not None and p.dim() >= 2 for p in module._parameters.values()):
                    yield inner


@dataclass
class _Marks:
    """Marks on the answers of modules."""

    heard: Heard = field(default_factory=Heard)
    names: dict[int, str] = field(default_factory=dict)
    held: list[torch.Tensor] = field(default_factory=list)
    early: list[str] = field(default_factory=list)
    """Modules that are called before keys and values are stored."""
    widths: dict[str, int] = field(default_factory=dict)
    stored: list[torch.Tensor] = field(default_factory=list)

    def put(self, name: str, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple | list) else out
        mark = first.new_zeros(()).requires_grad_()
        self.names[id(mark)] = name
        self.held.append(mark)
        if not self.heard.stored:
            self.early.append(name)
        if first is out:
            self.widths[name] = first.shape[-1]
            return first + mark
        return (first + mark, *out[1:])

    def cached(self, keys: torch.Tensor, values: torch.Tensor) -> KeysValues:
        """What the cache answers, each of the two marked."""
        self.stored = [one.new_zeros(()).requires_grad_() for one in (keys, values)]
        return keys + self.stored[0], values + self.stored[1]

    def halves(self, made: torch.Tensor) -> set[int]:
        """Of which of the two `made` was made: 0 for the stored keys, 1 for the stored values."""
        leaves = leaves_of(made)
        return {half for half, mark in enumerate(self.stored) if id(mark) in leaves}

    def behind(self, made: torch.Tensor | None) -> set[str]:
        """The modules of whose answers `made` was made."""
        return {self.names[leaf] for leaf in leaves_of(made) if leaf in self.names}


@contextmanager
def _marked(layer: nn.Module, inside: list[str]) -> Iterator[_Marks]:
    marks = _Marks()
    handles = [
        layer.get_submodule(name).register_forward_hook(lambda _, __, out, n=name: marks.put(n, out)) for name in inside
    ]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def leaves_of(made: torch.Tensor | None) -> set[int]:
    """The identities of the leaves of torch's graph behind a tensor."""
    found, seen = set[int](), set[Any]()
    todo = [None if made is None else made.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        todo += [after for after, _ in node.next_functions]
    return found


def _with_marked_tables(call: Call) -> tuple[list[torch.Tensor], Call]:
    """The call with a mark on every tensor of fractions that it names besides the state, and these marks."""
    marks = list[torch.Tensor]()

    def marked(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            marks.append(value.new_zeros(()).requires_grad_())
            return value + marks[-1]
        return tuple(map(marked, value)) if type(value) is tuple else value

    args, kwargs = call
    return marks, (
        (*args[:1], *map(marked, args[1:])),
        {name: value if name == "hidden_states" else marked(value) for name, value in kwargs.items()},
    )
