"""Tensors of a run that change what goes into it and what comes out of it, and those that scale what a module makes.

With f the run and x the state before it,

    x' = keeps * x + sum over N of reads.N h_N + shift        in front of the run
    y  = x' + g * (f(x') - x')                                behind it

`ID.keeps` [1] or [hidden]; `ID.reads.N` [1], [hidden] or [hidden, hidden], h_N the state behind the layer N, and behind
the embeddings for N = -1; `ID.shift` [hidden]; g is `ID.change` [1] or [hidden], or of each token (tanh(w x' + b) + 1)
/ 2 with `ID.mixer.weight` [1, hidden] and `ID.mixer.bias` [1]. What is not there changes nothing.

ID.MODULE.scale [1] or [out] and ID.MODULE.shift [out] make y * scale + shift of what a linear module makes.

`ID.masks` [n, hidden] changes nothing: it stands for the embeddings of n tokens that are not known yet, and the draft
`s3d` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

from shoal.plan.low_rank import by_module
from shoal.plan.steps import Run

T = TypeVar("T")
EMBEDDED = -1
"""The number of the state behind the embeddings."""
AFFINE = ("scale", "shift")
MASKS = "masks"
_AROUND = re.compile(r"keeps|shift|change|mixer\.(weight|bias)|reads\.(-1|\d+)|masks")
_READS = "reads."


def around_run(own: Mapping[str, T], there: Collection[str] = ()) -> dict[str, T]:
    """Those tensors of a run that stand around it, by their names; `there`: names that the layer has itself."""
    return {name: one for name, one in own.items() if _AROUND.fullmatch(name) and name not in there}


def states_read(own: Collection[str], there: Collection[str] = ()) -> set[int]:
    """The layers behind which a run with these tensors reads the state; `EMBEDDED` for the embeddings."""
    found = around_run(dict.fromkeys(own), there)
    return {int(name.removeprefix(_READS)) for name in found if name.startswith(_READS)}


def affine_of(own: Mapping[str, T], there: Collection[str] = ()) -> dict[str, dict[str, T]]:
    """By module the scale and the shift of what it makes."""
    return by_module(own, there, AFFINE)


def is_beside(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor with this name in its run stands beside the layer's own, given that the layer has none of that
    name."""
    module, _, word = name.rpartition(".")
    return bool(_AROUND.fullmatch(name)) or (bool(module) and word in AFFINE and len(shape) < 2)


def around_flops(own: Mapping[str, tuple[int, ...]]) -> int:
    """FLOPs for one token of the matrices that stand around a run."""
    matrices = (shape for name, shape in around_run(own).items() if len(shape) == 2 and name != MASKS)
    return sum(2 * rows * columns for rows, columns in matrices)


def unfit_around(
    run: Run,
    weights_id: str,
    hidden: int,
    there: Mapping[str, tuple[int, ...]],
    own: Mapping[str, tuple[int, ...]],
    before: Collection[int],
) -> Iterator[tuple[str, int, str]]:
    """P129 for tensors around a run, or beside its modules, that do not fit. `before`: the layers that have run, and
    `EMBEDDED`."""
    found = around_run(own, there)
    for name, shape in found.items():
        right = _shapes(name, shape, hidden)
        if shape not in right:
            words = " or ".join(str(list(one)) for one in right)
            yield "P129", run.layer, f"{weights_id}.{name} is {list(shape)} instead of {words}; make it for this model"
    if "mixer.bias" in found and "mixer.weight" not in found:
        yield "P129", run.layer, f"{weights_id}.mixer.bias has no {weights_id}.mixer.weight [1, {hidden}]; give both"
    if "change" in found and "mixer.weight" in found:
        yield "P129", run.layer, f"{weights_id} has a change and a mixer, which both weigh what it does; give one"
    for layer in sorted(states_read(own, there) - set(before)):
        read = f"{weights_id}.{_READS}{layer} reads the state behind layer {layer}"
        yield "P129", run.layer, f"{read}, which does not run before layer {run.layer}; name one that does"
    for module, words_of in affine_of(own, there).items():
        yield from _unfit_affine(run, f"{weights_id}.{module}", module, there, words_of)


def _unfit_affine(
    run: Run, here: str, module: str, there: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, int, str]]:
    weight = there.get(f"{module}.weight")
    if weight is None or len(weight) != 2:
        yield "P129", run.layer, f"{here} has a scale or a shift, and layer {run.layer} no matrix {module}.weight"
        return
    for word, shape in given.items():
        one = (1,) if word == "scale" else None
        if shape != one and shape not in {(size,) for size in weight}:
            right = "[1] or [out]" if one else "[out]"
            yield "P129", run.layer, f"{here}.{word} is {list(shape)} at a matrix of {list(weight)}; give {right}"


def _shapes(name: str, shape: tuple[int, ...], hidden: int) -> tuple[tuple[int, ...], ...]:
    """The shapes that a tensor around a run may have, which has `shape`."""
    match name.partition(".")[0]:
        case "keeps" | "change":
            return (1,), (hidden,)
        case "reads":
            return (1,), (hidden,), (hidden, hidden)
        case "shift":
            return ((hidden,),)
        case "masks":
            return ((max(1, *shape[:1]), hidden),)
        case _:
            return ((1, hidden),) if name.endswith("weight") else ((1,),)
