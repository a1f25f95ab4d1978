"""Which layers share with which: patterns and lists, as a person types them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Mapping
from typing import Literal

import torch

from shoal.errors import UsageError
from shoal.fitting.result import Job, Transformed
from shoal.plan import Plan, Run, StackSpec
from shoal.plan.edit import with_weights
from shoal.plan.sources import KV
from shoal.plan.steps import runs

Group = tuple[int, ...]
"""The layer that is read, and those that read it."""
Pattern = Literal["pairs", "groups", "last", "later"]
_PIECE = re.compile(r"\d+(-\d+)+")


def listed_groups(text: str, what: str) -> tuple[Group, ...]:
    """`4-5+9-10-11` -> ((4, 5), (9, 10, 11)): layer 5 reads 4, and 10 and 11 read 9. Raises U667 for another text and
    for a layer that is named twice."""
    pieces = [piece.strip() for piece in text.split("+")]
    for piece in pieces:
        if not _PIECE.fullmatch(piece):
            raise UsageError(
                f"{what}: pairs={text} cannot be read at {piece!r}; write the layer that is read and then those that "
                "read it, as in pairs=4-5+9-10-11",
                code="U667",
            )
    groups = tuple(tuple(map(int, piece.split("-"))) for piece in pieces)
    named = [layer for group in groups for layer in group]
    if twice := next((layer for layer in named if named.count(layer) > 1), None):
        raise UsageError(f"{what}: pairs={text} names layer {twice} twice; let each layer read or be read", code="U667")
    return groups


def patterned_groups(
    plan: Plan, stack: StackSpec, pattern: Pattern, *, group: int = 2, readers: int | None = None, what: str
) -> tuple[Group, ...]:
    """The groups of a pattern over the layers of `plan` that store keys and values, in its order.

    pairs: every second layer reads the one before it. groups: the first of every `group` is read by the others. last:
    the last `readers` layers read the last one before them. later: the `readers` layers before the last one read the
    last. Layers of another kind (window, heads) are grouped among
    themselves. Raises U667 for a group of no layer and for as many readers as there are layers.
    """
    if group < 1:
        raise UsageError(f"{what}: a group of {group} layers is none; give group=2 or more", code="U667")
    by_kind: dict[Hashable, list[int]] = {}
    order = [run.layer for run in runs(plan.steps(stack.name)) if can_share(run, stack)]
    for layer in order:
        by_kind.setdefault((stack.layers[layer].kv, stack.layers[layer].kind), []).append(layer)
    if pattern not in ("last", "later"):
        size = 2 if pattern == "pairs" else group
        cut = [kind[at : at + size] for kind in by_kind.values() for at in range(0, len(kind), size)]
        return tuple(sorted(tuple(one) for one in cut if len(one) > 1))
    if readers is None or not 0 <= readers < len(order):
        asked = "readers is missing" if readers is None else f"readers={readers}"
        raise UsageError(
            f"{what}: {asked}, and {len(order)} layers store keys and values; give readers=0 to {len(order) - 1}",
            code="U667",
        )
    end = len(order) - (pattern == "later")
    reading = set(order[max(0, end - readers) : end])
    groups = []
    for kind in by_kind.values():
        if pattern == "later":
            reading.discard(kind[-1])
        before, after = [one for one in kind if one not in reading], [one for one in kind if one in reading]
        if after and not before:
            raise UsageError(
                f"{what}: readers={readers} leaves no layer like {after[0]} that stores keys and values; take fewer",
                code="U667",
            )
        if after:
            groups.append((before[-1], *after))
    return tuple(sorted(groups))


def neighbours(plan: Plan, stack: StackSpec) -> tuple[Group, ...]:
    """Each two layers of one kind that store keys and values with none of that kind between them."""
    by_kind: dict[Hashable, list[int]] = {}
    for run in runs(plan.steps(stack.name)):
        if can_share(run, stack):
            by_kind.setdefault((stack.layers[run.layer].kv, stack.layers[run.layer].kind), []).append(run.layer)
    return tuple(sorted(pair for kind in by_kind.values() for pair in itertools.pairwise(kind)))


def cheapest_apart(costs: Mapping[Group, float], count: int) -> tuple[Group, ...]:
    """`count` of these pairs of neighbours with the least sum of costs of which no two have a layer in common, in
    order; none where so many cannot be chosen."""
    following = {pair[0]: pair for pair in costs}
    order: list[Group] = []
    for pair in sorted(costs):
        after: Group | None = pair
        while after is not None and after not in order:
            order.append(after)
            after = following.get(after[-1])
    left: _Chosen = {0: (0.0, ())}
    taken: _Chosen = {}
    for before, pair in zip([(), *order], order, strict=False):
        either = _cheaper(left, taken)
        start = left if before and before[-1] == pair[0] else either
        left, taken = either, {n + 1: (cost + costs[pair], (*own, pair)) for n, (cost, own) in start.items()}
    return tuple(sorted(_cheaper(left, taken).get(count, (0.0, ()))[1]))


_Chosen = dict[int, tuple[float, tuple[Group, ...]]]
"""By the number of pairs the least sum of costs, and the pairs."""


def _cheaper(one: _Chosen, other: _Chosen) -> _Chosen:
    return {n: min(own[n] for own in (one, other) if n in own) for n in one.keys() | other.keys()}


def can_share(run: Run, stack: StackSpec) -> bool:
    """Whether a run has keys and values of its own in a cache, and none of another layer."""
    return run.part != "mlp" and run.kv == KV() and stack.layers[run.layer].kv.kind in ("full", "sliding")


def sole_runs(plan: Plan, groups: tuple[Group, ...], stack: StackSpec, what: str) -> dict[int, Run]:
    """The run of each layer in `groups`. Raises U667 for a layer that does not run exactly once with keys and values of
    its own, or behind a gate."""
    found: dict[int, Run] = {}
    for layer in (layer for group in groups for layer in group):
        own = [run for run in runs(plan.steps(stack.name)) if run.layer == layer and run.part != "mlp"]
        if len(own) != 1 or own[0].gate is not None or not (layer < stack.depth and can_share(own[0], stack)):
            raise UsageError(
                f"{what}: layer {layer} must run once, with keys and values of its own and without a gate, and in "
                f"{plan} it does not; name another",
                code="U667",
            )
        found[layer] = own[0]
    return found


def with_tensors(
    job: Job, plan: Plan, new: Mapping[int, Mapping[str, torch.Tensor]], name: str, *notes: str
) -> Transformed:
    """`plan` in which each layer of `new` has these tensors, by their names within it, under the id NAME-LAYER."""
    ids = {layer: f"{name}-{layer}" for layer in new}
    own = {f"{ids[layer]}.{key}": tensor for layer, tensors in new.items() for key, tensor in tensors.items()}
    return Transformed(with_weights(plan, ids, stack=job.stack), {**job.weights, **own}, notes=notes)
