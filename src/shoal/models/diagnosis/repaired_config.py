"""Repairs a config: what the layers at hand ask for."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from shoal.errors import ModelError, WriteError
from shoal.models.depth import INDEX_LISTS, PER_LAYER, RULES, permuted_config
from shoal.models.diagnosis.configs import (
    Fields,
    depth_name,
    depth_said,
    derived,
    empty,
    lengths_of,
    lists_of,
    made,
    text_of,
    with_depth,
)
from shoal.models.diagnosis.finding import Finding
from shoal.models.diagnosis.layers import Fit, Layers
from shoal.models.diagnosis.match_layers import matched_layers
from shoal.models.opened import open_model

_GROUPS = [*(rule.fields for rule in RULES), *((name,) for name in (*PER_LAYER, *INDEX_LISTS))]
"""Fields that say one thing together."""
_MOST_TRIED = 200
"""Layers of a model for which every value of a number is tried: each costs building the model without weights."""
NOTE = "shoal"
"""The key of the lineage in a config that Shoal wrote."""


@dataclass(frozen=True)
class RepairedConfig:
    """A config for the layers at hand."""

    raw: Fields
    """Of the whole model."""
    unknown: tuple[str, ...] = ()
    """Fields whose values cannot be known; `raw` leaves them to the class."""
    why: str = "the layers that are there"
    base: PreTrainedConfig | None = None
    """The config that `kept` counts in, when `kept` is known to be true."""
    kept: tuple[int, ...] | None = None

    def changed(self, old: Fields) -> dict[str, tuple[Any, Any]]:
        """Fields of the text part that differ from those of `old`, {field: (old, new)}."""
        before, after = text_of(old), text_of(self.raw)
        names = [n for n in {**before, **after} if before.get(n) != after.get(n) and n != NOTE]
        return {n: (before.get(n), after.get(n)) for n in names}

    def findings(self, old: Fields) -> list[Finding]:
        """What the config `old` says wrongly."""
        found = []
        for name, (before, after) in self.changed(old).items():
            if name in self.unknown:
                wanted, mend = f"the entries of the {depth_said(self.raw)} layers that were kept", None
            else:
                wanted, mend = _short(after), f"set from {self.why}"
            found.append(Finding(name, _short(before) if name in text_of(old) else "not said", wanted, mend))
        return found


def repaired_config(raw: Fields, layers: Layers, source: str, kept: tuple[int, ...] | None) -> RepairedConfig:
    """The config for the layers that are there, as far as it can be known. Raises M334 for a `kept` that cannot be."""
    count, said = len(layers.numbers), depth_said(raw)
    stale = {name: length for name, length in lengths_of(raw).items() if length != count}
    gaps = layers.numbers != tuple(range(count))
    if kept is None and not stale and not gaps:
        return RepairedConfig(raw if said == count else _at(raw, count))
    depth = _base_depth(stale, layers, said, kept)
    if kept is not None:
        _require_fitting(kept, count, depth, source)
        return _kept(raw, count, depth, source, kept, "the layers that --kept names")
    if gaps and layers.numbers[-1] < depth:
        return _kept(raw, count, depth, source, layers.numbers, "the numbering of the layers")
    known = _noted(raw, count, depth)
    if known is not None:
        return _kept(raw, count, depth, source, known, "the layers that the key shoal names")
    guess = matched_layers(with_depth(raw, depth), layers, source, ordered=True) if depth > count else None
    if guess is not None:
        found = _kept(raw, count, depth, source, guess, "the layers' tensors, which leave one choice")
        return RepairedConfig(found.raw, found.unknown, found.why)
    return RepairedConfig(_at(raw, count), tuple(stale))


def by_tensors(config: RepairedConfig, layers: Layers, source: str) -> RepairedConfig | None:
    """`config` with one of its per-layer facts set to what the layers' tensors show; None when they do not show it.

    As little as possible is changed, one list or the numbers of one rule, since a layer that fits another place by its
    tensors need not have what other fields say of that place.
    """
    raw, count = config.raw, len(layers.numbers)
    rules = [" ".join(rule.fields) for rule in RULES] + list(INDEX_LISTS)
    indices = [i for v in text_of(raw).values() if isinstance(v, list) for i in v if type(i) is int and 0 <= i < 4096]
    for depth, subject in ((count, None), (max(2 * count, max(indices, default=0) + 2), rules)):
        try:
            guess = matched_layers(with_depth(raw, depth), layers, source, ordered=False, subject=subject)
            if guess is None:
                continue
            found = _kept(raw, count, depth, source, guess, "the layers' tensors")
        except (ModelError, WriteError):
            continue
        changed = found.changed(raw)
        for group in [g for g in _GROUPS if any(name in changed for name in g)]:
            new = copy.deepcopy(raw)
            text_of(new).update({name: changed[name][1] for name in group if name in changed})
            if all_fit(new, layers, source):
                return RepairedConfig(new, (), found.why, config.base, config.kept)
    for new in variants(raw, count):
        if all_fit(new, layers, source):
            return RepairedConfig(new, (), "the layers' tensors", config.base, config.kept)
    return None


def all_fit(raw: Fields, layers: Layers, source: str) -> bool:
    """Is every layer at hand, in its place, one of the model of `raw`?"""
    try:
        model = empty(made(raw, source), source)
        fit = Fit(model, open_model(model).stack(), layers)
    except ModelError:
        return False
    return all(fit.fits(layers.by_number[number], slot) for slot, number in enumerate(layers.numbers))


def variants(raw: Fields, count: int) -> Iterator[Fields]:
    """`raw` with each other value of each rule that is one number, such as "the last k layers share KV"."""
    for rule in RULES:
        value = text_of(raw).get(rule.fields[0])
        if len(rule.fields) > 1 or type(value) is not int or count > _MOST_TRIED:
            continue
        for fields in rule.candidates({rule.fields[0]: value}, [False] * count):
            new = copy.deepcopy(raw)
            text_of(new).update(fields)
            if fields != {rule.fields[0]: value}:
                yield new


def _kept(raw: Fields, count: int, depth: int, source: str, kept: tuple[int, ...], why: str) -> RepairedConfig:
    """`raw`, whose stale fields are those of `depth` layers, for its layers `kept`. Lists that have one entry for each
    of the `count` layers already are right and stay."""
    right = {name: value for name, value in lists_of(raw).items() if len(value) == count != depth}
    base = made(with_depth(raw, depth), source)
    text = base.get_text_config(decoder=True)
    _, changed = permuted_config(text, kept)
    new = _at(raw, count)
    counted = {depth_name(raw)} if derived(raw) else set()
    text_of(new).update({name: value for name, (_, value) in changed.items() if name not in counted} | right)
    for name, value in lists_of(with_depth(raw, depth)).items():  # as it was where it needs no change
        text_of(new).setdefault(name, value)
    return RepairedConfig(json.loads(json.dumps(new)), (), why, base, kept)


def _at(raw: Fields, count: int) -> Fields:
    new = with_depth(raw, count)
    if depth_name(raw) != "num_hidden_layers":
        text_of(new).pop("num_hidden_layers", None)
    note = new.get(NOTE)
    if isinstance(note, dict) and isinstance(note.get("base_layers"), list) and len(note["base_layers"]) != count:
        del new[NOTE]
    return new


def _base_depth(stale: dict[str, int], layers: Layers, said: int | None, kept: tuple[int, ...] | None) -> int:
    """How many layers the fields that are wrong describe."""
    lowest = max(layers.numbers[-1], *(kept or (0,))) + 1
    lengths = Counter(stale.values())
    if said is not None and said in lengths:
        return said
    if lengths:
        return lengths.most_common(1)[0][0]
    return max(lowest, said or 0)


def _require_fitting(kept: tuple[int, ...], count: int, depth: int, source: str) -> None:
    if len(kept) != count or max(kept) >= depth or min(kept) < 0:
        raise ModelError(
            f"--kept names {len(kept)} layers up to {max(kept, default=-1)}, {source} holds {count} of a base with "
            f"{depth}; name one base layer for each",
            code="M334",
        )


def _noted(raw: Fields, count: int, depth: int) -> tuple[int, ...] | None:
    """The layers of the first base that the lineage names, when the stale fields are those of that base."""
    note = raw.get(NOTE)
    layers = note.get("base_layers") if isinstance(note, dict) else None
    base = note.get("base") if isinstance(note, dict) else None
    depths = base.get("layers") if isinstance(base, dict) else None
    if not isinstance(layers, list) or len(layers) != count or not all(type(i) is int for i in layers):
        return None
    if not isinstance(depths, dict) or depth not in depths.values() or not all(0 <= i < depth for i in layers):
        return None
    return tuple(layers)


def _short(value: Any) -> str:
    text = json.dumps(copy.copy(value), default=str)
    return text if len(text) <= 160 else f"{text[:157]}..."
