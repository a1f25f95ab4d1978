"""Where the layers of a checkpoint come from, over any number of prunings: one key of config.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.errors import NotationError
from shoal.plan.file import MAX_BYTES, load_plan
from shoal.plan.notation import format_steps, parse_steps
from shoal.plan.steps import Run, Step, runs

KEY = "shoal"
_LONGEST = 10_000


@dataclass(frozen=True, slots=True)
class Lineage:
    """What is known of the layers of one checkpoint."""

    layers: tuple[int, ...]
    """For each layer, in order, the layer of the ORIGINAL base that it is."""
    base: dict[str, Any]
    """The original base: {family, fingerprint, layers, source}."""
    chain: tuple[str, ...] = ()
    """The prunings, first one first, as depth notation in the numbers of the model that each was applied to."""
    silent: frozenset[tuple[int, str]] = field(default_factory=frozenset)
    """(place, part) whose tensors are zero."""

    @property
    def notation(self) -> str:
        """The layers as one plan of the original base; a layer whose two parts are silent is left out."""
        return format_steps(_steps(self.layers, self.silent))

    def then(self, slots: Sequence[int], silent: Iterable[tuple[int, str]], plan: str) -> Lineage:
        """The lineage of a model whose place s is layer `slots[s]` of this one, made by `plan`."""
        quiet = set(silent) | {(slot, part) for slot, i in enumerate(slots) for at, part in self.silent if at == i}
        return Lineage(tuple(self.layers[i] for i in slots), self.base, (*self.chain, plan), frozenset(quiet))

    def to_note(self, version: str) -> dict[str, Any]:
        """The value of `KEY` in config.json."""
        note: dict[str, Any] = {
            "base_layers": list(self.layers),
            "plan": self.notation,
            "chain": list(self.chain),
            "base": self.base,
            "version": version,
        }
        return note | ({"silent": sorted([slot, part] for slot, part in self.silent)} if self.silent else {})

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {"layers": list(self.layers), "plan": self.notation, "chain": list(self.chain), "base": self.base}

    def describe(self) -> str:
        """Two lines for people: the original layers, and the prunings when there were several."""
        source, depths = self.base.get("source"), _depths(self.base.get("layers"))
        name = f" of {source[:200]!r}" if isinstance(source, str) else " of its first base"
        depth = f" ({sum(depths)} layers)" if depths else ""
        text = f"original layers{name}{depth}: {self.notation}"
        if len(self.chain) > 1:
            text += f"\npruned {len(self.chain)} times, each in the numbers before it: {' then '.join(self.chain)}"
        return text


def read_lineage(note: object, depth: int | None) -> Lineage | None:
    """The lineage that a config's `KEY` holds for a model of `depth` layers; None when there is none, or when the note,
    which anyone may have edited, does not fit."""
    if not isinstance(note, dict) or not isinstance(note.get("base"), dict):
        return None
    layers, silent = note.get("base_layers"), note.get("silent", [])
    if not isinstance(layers, list) or len(layers) != depth or not all(type(i) is int and i >= 0 for i in layers):
        return None
    if not isinstance(silent, list) or not all(
        isinstance(s, list) and len(s) == 2 and type(s[0]) is int and s[1] in ("attention", "mlp") for s in silent
    ):
        return None
    return Lineage(tuple(layers), note["base"], _chain(note), frozenset((slot, part) for slot, part in silent))


def lineage_of_folder(place: str | Path) -> Lineage | None:
    """The lineage of a folder that `shoal write` made, by config.json and plan.json alone; None for others."""
    config = Path(place) / "config.json"
    try:
        if not config.is_file() or config.stat().st_size > MAX_BYTES:
            return None
        data = json.loads(config.read_bytes())
        depth = len(list(runs(load_plan(place).steps())))
    except (OSError, ValueError, RecursionError, NotationError):
        return None
    return read_lineage(data.get(KEY), depth) if isinstance(data, dict) else None


def _chain(note: dict[str, Any]) -> tuple[str, ...]:
    """The prunings, if every one of them is depth notation; otherwise the whole as one."""
    for found in (note.get("chain"), [note.get("plan")]):
        if isinstance(found, list) and found and all(_notation(text) for text in found):
            return tuple(found)
    return ()


def _notation(text: object) -> bool:
    try:
        return isinstance(text, str) and len(text) <= _LONGEST and bool(parse_steps(text))
    except NotationError:
        return False


def _depths(found: object) -> list[int]:
    return [depth for depth in found.values() if type(depth) is int] if isinstance(found, dict) else []


def _steps(layers: Sequence[int], silent: frozenset[tuple[int, str]]) -> tuple[Step, ...]:
    steps: list[Step] = []
    for slot, layer in enumerate(layers):
        match {part for at, part in silent if at == slot}:
            case parts if parts == {"mlp"}:
                steps.append(Run(layer, "attention"))
            case parts if parts == {"attention"}:
                steps.append(Run(layer, "mlp"))
            case parts if not parts:
                steps.append(Run(layer))
    return tuple(steps)
