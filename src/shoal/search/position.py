"""Position presets: remove layers by where they are, without looking at data."""

from __future__ import annotations

import random
from typing import Literal

from shoal.errors import UsageError
from shoal.plan import Plan, drop as drop_layers
from shoal.scores import Candidate, Found, Legal


def position(
    plan: Plan,
    *,
    drop: int,
    legal: Legal,
    which: Literal["first", "last", "middle", "alternate", "random"] = "last",
    stack: str | None = None,
    seed: int = 0,
) -> Found:
    """Remove the first, the last, the middle, every other (from the end) or randomly chosen layers.

    The baselines of Poor Man's BERT (Sajjad et al. 2020, arXiv 2004.03844: top, bottom, symmetric, alternate). "first"
    and "last" are meant literally: 0.. and ..L-1. "alternate" takes every other layer from the last but one downwards and
    then the nearest left. Raises U504 when the preset is not legal for the model.
    """
    layers = _order(sorted(set(plan.layers(stack))), which, seed, drop)[:drop]
    if len(layers) < drop or drop >= len(set(plan.layers(stack))):
        raise UsageError(f"cannot remove {drop} of {len(set(plan.layers(stack)))} layers; ask for fewer", code="U504")
    smaller = drop_layers(plan, layers, stack=stack)
    if not legal(smaller):
        raise UsageError(f"removing the layers {sorted(layers)} is not legal for this model; choose another preset", code="U504")
    return Found(smaller, (Candidate(str(smaller), float("nan"), f"preset {which}"),))


def _order(layers: list[int], which: str, seed: int, drop: int) -> list[int]:
    if which == "first":
        return layers
    if which == "last":
        return layers[::-1]
    if which == "middle":
        start = (len(layers) - drop) // 2
        return layers[start : start + drop]
    if which == "alternate":
        return [*layers[-2::-2], *layers[::-2]]
    return random.Random(seed).sample(layers, len(layers))
