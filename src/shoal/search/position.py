"""Position presets: remove layers by where they are, without looking at data."""

from __future__ import annotations

import math
import random
from typing import Literal, get_args

from shoal.errors import UsageError
from shoal.plan import Plan
from shoal.plan import drop as drop_layers
from shoal.scores import Candidate, Found, Legal, removable

Preset = Literal["first", "last", "middle", "alternate", "odd-alternate", "even-alternate", "random"]


def position(
    plan: Plan,
    *,
    drop: int,
    legal: Legal,
    which: Preset = "last",
    stack: str | None = None,
    seed: int = 0,
) -> Found:
    """Remove the first, the last, the middle, every other (from the end) or randomly chosen layers.

    "first" and "last" are meant literally: 0.. and ..L-1. "middle" leaves as many before as behind, or one more behind.
    "alternate" takes every other layer from the last but one downwards (of 12 layers 10, 8, 6, ...), and when these are
    used up the others from the last one downwards (11, 9, ...). "odd-alternate" takes those that are odd when counted
    from 1, from the end (of 12 layers 10, 8, 6, ...), and then the even ones; "even-alternate" the even ones (11, 9, 7,
    ...), and then the odd ones. "random" draws with `seed`; a larger draw holds the
    smaller ones.

    Source: the baselines of Poor Man's BERT (Sajjad et al. 2020, arXiv 2004.03844): bottom, top, symmetric, odd
    and even alternate.

    Raises U504 when the preset is not legal for the model, U502 for a preset that does not exist.
    """
    layers = _order(removable(plan, drop, stack), which, seed, drop)[:drop]
    smaller = drop_layers(plan, layers, stack=stack)
    if not legal(smaller):
        raise UsageError(
            f"the plan is not legal without the {which} layers {sorted(layers)}; choose another preset or number",
            code="U504",
        )
    return Found(smaller, (Candidate(str(smaller), math.nan, f"preset {which}"),))


def _order(layers: tuple[int, ...], which: Preset, seed: int, drop: int) -> tuple[int, ...]:
    match which:
        case "first":
            return layers
        case "last":
            return layers[::-1]
        case "middle":
            return layers[(len(layers) - drop) // 2 :]
        case "alternate":
            return (*layers[-2::-2], *layers[::-2])
        case "odd-alternate":
            return (*layers[::2][::-1], *layers[1::2][::-1])
        case "even-alternate":
            return (*layers[1::2][::-1], *layers[::2][::-1])
        case "random":
            return tuple(random.Random(seed).sample(layers, len(layers)))
    raise UsageError(f"there is no preset {which!r}; use {', '.join(get_args(Preset))}", code="U502")
