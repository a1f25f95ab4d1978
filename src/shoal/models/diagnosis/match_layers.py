"""Matches the layers at hand with layers of a deeper base, as far as their tensors tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from shoal.models.depth import layer_facts
from shoal.models.diagnosis.configs import Fields, empty, made
from shoal.models.diagnosis.layers import Fit, Layers
from shoal.models.opened import open_model


def matched_layers(
    base: Fields, layers: Layers, source: str, *, ordered: bool, subject: Sequence[str] | None = None
) -> tuple[int, ...] | None:
    """For each layer at hand, in the order of their numbers, a layer of `base` (the fields of a config) that its
    tensors fit; None when there is none, or when several fit that differ in a field of `subject` (None: in any field).

    `ordered`: the layers kept the order that they had in the base. The layers named may not be the true ones, but
    every fact of theirs that a config states is.
    """
    config = made(base, source)
    model = empty(config, source)
    stack = open_model(model).stack()
    fit = Fit(model, stack, layers)
    choices = [[i for i in range(fit.depth) if fit.fits(layers.by_number[n], i)] for n in layers.numbers]
    if ordered:
        choices = _in_order(choices)
    if not all(choices):
        return None
    facts = _facts(stack.config, fit.depth, subject)
    if any(len({facts[i] for i in some}) > 1 for some in choices):
        return None
    chosen: list[int] = []
    for some in choices:
        chosen.append(next(i for i in some if not ordered or not chosen or i > chosen[-1]))
    return tuple(chosen)


def _facts(config: PreTrainedConfig, depth: int, subject: Sequence[str] | None) -> list[str]:
    found: list[dict[str, Any]] = layer_facts(config, depth)
    return [repr(sorted((n, repr(v)) for n, v in fact.items() if subject is None or n in subject)) for fact in found]


def _in_order(choices: list[list[int]]) -> list[list[int]]:
    """The choices that belong to some strictly rising sequence with one choice of every list."""
    lowest, bound = [], -1
    for some in choices:
        bound = min((i for i in some if i > bound), default=1 << 62)
        lowest.append(bound)
    highest, bound = [], 1 << 62
    for some in reversed(choices):
        bound = max((i for i in some if i < bound), default=-1)
        highest.append(bound)
    highest.reverse()
    return [[i for i in some if low <= i <= high] for some, low, high in zip(choices, lowest, highest, strict=True)]
