"""Tensors of a run that change one matrix of its layer a little, or stand for it in two factors.

ID.MODULE.up [out, rank] and .down [rank, in] add up(down x) to what the module makes; .left [out, rank] and .right
[rank, in] make left(right x) in the place of the matrix, which is then neither read nor kept. The module's bias stays.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

from shoal.plan.steps import Run

T = TypeVar("T")
BESIDE, INSTEAD = ("up", "down"), ("left", "right")
WORDS = {**dict.fromkeys(BESIDE, BESIDE), **dict.fromkeys(INSTEAD, INSTEAD)}


def factors_of(own: Mapping[str, T], there: Collection[str]) -> dict[str, dict[str, T]]:
    """By module the factors among the tensors `own` of one id; `there`: names that the layer has itself, none of which
    is a factor."""
    return by_module(own, there, WORDS)


def by_module(own: Mapping[str, T], there: Collection[str], words: Collection[str]) -> dict[str, dict[str, T]]:
    """By module those of the tensors `own` that are called MODULE.WORD for one of `words`, unless they are `there`."""
    found: dict[str, dict[str, T]] = {}
    for name, tensor in own.items():
        module, _, word = name.rpartition(".")
        if word in words and module and name not in there:
            found.setdefault(module, {})[word] = tensor
    return found


def replaced_matrices(own: Collection[str]) -> set[str]:
    """The names of the matrices for which two factors stand."""
    modules = {name.rpartition(".")[0] for name in own if name.rpartition(".")[2] == "left"}
    return {f"{module}.weight" for module in modules if module and f"{module}.right" in own}


def unfit_factors(
    run: Run, weights_id: str, stack: str, there: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, int, str]]:
    """P129 for factors that are not whole, or do not fit the matrix of their module in the layer."""
    for module, found in factors_of(own, there).items():
        here = f"{weights_id}.{module}"
        weight = there.get(f"{module}.weight")
        pair = WORDS[next(iter(found))]
        if weight is None or len(weight) != 2:
            yield "P129", run.layer, f"{here} has factors, and {stack} layer {run.layer} has no matrix {module}.weight"
        elif set(found) != set(pair):
            words = f"{here} needs .{pair[0]} and .{pair[1]}, and has .{', .'.join(found)}"
            yield "P129", run.layer, f"{words}; give one pair, up and down or left and right"
        elif pair == INSTEAD and f"{module}.weight" in own:
            yield "P129", run.layer, f"{here} has a matrix of its own and two factors in its place; give one of them"
        elif reason := _misfit(found[pair[0]], found[pair[1]], weight):
            yield "P129", run.layer, f"{here}.{pair[0]} and .{pair[1]} {reason}"


def _misfit(first: tuple[int, ...], second: tuple[int, ...], weight: tuple[int, ...]) -> str | None:
    shapes = f"are {list(first)} and {list(second)} at a matrix of {list(weight)}"
    if len(first) != 2 or len(second) != 2 or first[1] != second[0]:
        return f"{shapes}; give [out, rank] and [rank, in]"
    if sorted((first[0], second[1])) != sorted(weight):
        return f"{shapes}; give [out, rank] and [rank, in]"
    if first[1] > min(weight):
        return f"{shapes}, a rank above that of the matrix; give at most {min(weight)}"
    return None
